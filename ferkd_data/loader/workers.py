"""The worker processes of a loader, and the memory for crops that they share with it.

`pool.py` hands out the windows; a worker writes the crops of one into a slot, and sends the targets back.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import cloudpickle
from torch import Tensor

from ferkd_data.errors import UsageError
from ferkd_data.loader.batch_maker import BatchMaker, Made
from ferkd_data.loader.channel import CROP_MEMORY, NOT_KEPT, BatchBuffers, MappedSlots, Slot
from ferkd_data.loader.clocks import added, spent_on
from ferkd_data.loader.epochs import EpochSettings
from ferkd_data.loader.pool import Job, Pool
from ferkd_data.loader.schedule import Window
from ferkd_data.storage import too_many_open_files

HELD_BATCHES = 3
"""Windows that a user's loop holds at a time, unless it collects batches: memory beyond that of windows in work."""


class WindowTask(NamedTuple):
    """The message that asks a worker for a window."""

    window: Window
    settings: EpochSettings
    """Evaluated here: a schedule may be a function that cannot be sent."""
    slot: int = NOT_KEPT
    """The number of the slot that comes with it."""


class CropHandler:
    """The work of a worker: it writes the crops into the slot that comes with the task, and sends the targets back."""

    def __init__(self, maker: BatchMaker) -> None:
        self.maker = maker
        self.memory = MappedSlots()

    def __call__(self, task: WindowTask, descriptors: list[int]) -> tuple[Made, list[int]]:
        # From the training, where a schedule may be a function: a worker evaluates none (`for_workers`).
        self.maker.learn(task.window.epoch, task.settings)
        if not descriptors:
            raise too_many_open_files(CROP_MEMORY)
        # Mapping counts as sending: it is part of the price of handing crops over in shared memory.
        with self.maker.clock.send:
            outs = self.memory.images(task.slot, descriptors[0], self.maker.shapes(task.settings))
        return self.maker.make(task.window, *outs), []


@dataclass(eq=False, kw_only=True)
class CropJob(Job):
    """A window to make, whose crops go into a slot of shared memory."""

    window: Window
    settings: EpochSettings
    take: Callable[[int | None], Slot]
    slot: Slot | None = None

    def task(self, worker: int | None) -> tuple[WindowTask, tuple[int, ...]]:
        # A job that is done again keeps its slot: the dead worker writes no more, and the new one fills all of it.
        self.slot = self.slot or self.take(worker)
        return WindowTask(self.window, self.settings, self.slot.number), (self.slot.descriptor,)


def timed(job: Job, made: Made) -> Made:
    """Add to a job's result what only the training process knows of its time."""
    spent = added(made.spent, spent_on(send=job.send_seconds))
    return made._replace(spent=spent, by_worker=job.by_worker)


class Workers:
    """The worker processes of a loader, alive for many epochs, and the memory they share with it."""

    def __init__(self, maker: BatchMaker, num_workers: int, prefetch_factor: int) -> None:
        self._maker = maker
        # The user's loop holds one batch while it waits for the next; one more for loops that look ahead.
        keep = num_workers * prefetch_factor + HELD_BATCHES
        self._buffers = buffers = BatchBuffers(keep=keep, shared=num_workers > 0)

        def drop(job: CropJob) -> None:
            if job.slot is not None:
                buffers.give_back(job.slot)

        # Pickled when workers are started, and never without workers: what the user gave need not be picklable then.
        self._pool = Pool(lambda: pickled(CropHandler(maker.for_workers())), num_workers, prefetch_factor, drop)

    def make(self, windows: Iterator[Window]) -> Iterator[tuple[Window, tuple[Tensor, ...], Made]]:
        """Yield the windows in order, with their crops (of each kind) and targets. Raises what making them raises."""
        for job in self._pool.run(map(self._job, windows), self._here):
            made = timed(job, job.result)
            assert job.slot is not None
            yield job.window, self._buffers.lend(job.slot, [sum(kind.batches) for kind in made.kinds]), made

    def _job(self, window: Window) -> CropJob:
        settings = self._maker.epoch_settings(window.epoch)
        take = partial(self._buffers.take, self._maker.shapes(settings))
        return CropJob(window=window, settings=settings, take=take)

    def _here(self, job: CropJob) -> Made:
        job.slot = job.slot or job.take(None)
        return self._maker.make(job.window, *job.slot.images())

    def wait(self) -> None:
        """Wait until all workers are ready. Without this, windows are made in this process until the first one is."""
        self._pool.wait_for_workers()


def pickled(work: object) -> bytes:
    """Pickle work for worker processes. They never import the user's script or notebook: its definitions go by value.

    Raises UsageError for what cannot be pickled, and for tensors on a device.
    """
    content = io.BytesIO()
    try:
        _WorkPickler(content).dump(work)
        return content.getvalue()
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"what the loader was given cannot be sent to worker processes ({error}); leave out of it what belongs to "
            "this process, such as open files, locks and CUDA tensors, or use num_workers=0"
        ) from error


class _WorkPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Refuses tensors on a device: unpickled before the workers are forked, they would make CUDA fail in each."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor) and obj.device.type != "cpu":
            raise pickle.PicklingError(f"a tensor on {obj.device}")
        return super().reducer_override(obj)
