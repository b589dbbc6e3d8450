"""The worker processes behind a `CropLoader`."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ferkd_data.errors import FerkdError
from ferkd_data.loader.batch_maker import BatchMaker, Made, Work
from ferkd_data.loader.buffers import BatchBuffers, Slot
from ferkd_data.loader.plan import Window

HELD_BATCHES = 3
"""That users hold at a time, as long as they do not keep them: slots beyond those in work."""


class _Task(NamedTuple):
    """What travels to a worker."""

    window: Window
    slot: Slot


class _MadeInSlots(Dataset[Made | FerkdError]):
    """What workers do: the crops go into the buffers, which they map once; only targets, or an error, travel back."""

    def __init__(self, maker: BatchMaker, buffers: BatchBuffers) -> None:
        self.maker, self.buffers = maker, buffers

    def __getitem__(self, task: _Task) -> Made | FerkdError:
        try:
            return self.maker.make(Work(task.window, self.buffers.at(task.slot)))
        except FerkdError as error:
            # As PyTorch would pass it on, the message would be a traceback.
            return error


class _Tasks(Sampler[_Task]):
    """Hands out windows, each with memory for its crops. Knows nothing of the DataLoader that asks it: a cycle of the
    two would be taken apart in an order in which workers never hear that they may leave.
    """

    def __init__(self, buffers: BatchBuffers) -> None:
        self.buffers = buffers
        self.under_way: deque[_Task] = deque()
        self.windows: Iterator[Window] = iter(())

    def __iter__(self) -> Iterator[_Task]:
        """Before the first is asked for, PyTorch has waited for those of an epoch left early."""
        while self.under_way:
            self.buffers.give_back(self.under_way.popleft().slot)
        for window in self.windows:
            task = _Task(window, self.buffers.take())
            self.under_way.append(task)
            yield task


class Workers:
    """The worker processes of a loader, alive for many epochs, and the memory they share with it."""

    def __init__(self, maker: BatchMaker, num_crops: int, size: int, num_workers: int, prefetch_factor: int) -> None:
        # The user's loop holds one batch while it waits for the next; one more for loops that look ahead.
        slots = num_workers * prefetch_factor + HELD_BATCHES
        self._tasks = _Tasks(BatchBuffers(num_crops, size, slots=slots, shared=num_workers > 0))
        self._loader = start(_MadeInSlots(maker, self._tasks.buffers), self._tasks, num_workers, prefetch_factor)

    def make(self, windows: Iterator[Window]) -> Iterator[tuple[Window, Tensor, Made]]:
        """The windows with their crops and targets, in order."""
        tasks = self._tasks
        tasks.windows = windows
        for made in self._loader:
            if isinstance(made, FerkdError):
                raise made
            task = tasks.under_way.popleft()
            yield task.window, tasks.buffers.lend(task.slot, sum(made.batches)), made

    def end(self) -> None:
        """Let the processes go now: whoever keeps an error keeps its frames, and with them all that is used there."""
        del self._loader


def start(work: Dataset[Any], tasks: Sampler[Any], num_workers: int, prefetch_factor: int) -> DataLoader[Any]:
    """A DataLoader whose workers do `work[task]` for each task, in order, and end with their training."""
    return DataLoader(
        work,
        batch_size=None,
        sampler=tasks,
        # Each iteration over a DataLoader draws a seed for its workers; from the global generator, were there no other.
        generator=torch.Generator(),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_end_with_parent if num_workers else None,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        multiprocessing_context="forkserver" if num_workers and sys.platform == "linux" else None,
    )


def _end_with_parent(worker_id: int) -> None:
    """PyTorch's workers watch their parent, which here is the fork server; that lives on until they end: for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(process: Any) -> None:
    process.join()
    os._exit(1)


def _as_it_is(made: Any) -> Any:
    return made
