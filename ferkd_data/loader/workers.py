"""The windows of a loader as batches of crops, made by worker processes or by this one."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import cloudpickle
from torch import Tensor

from ferkd_data.errors import UsageError
from ferkd_data.loader.batch_maker import BatchMaker, Made, Work
from ferkd_data.loader.buffers import NOT_KEPT, BatchBuffers, MappedSlots, Slot
from ferkd_data.loader.epochs import EpochSettings
from ferkd_data.loader.plan import Window
from ferkd_data.loader.pool import Job, Pool
from ferkd_data.loader.stage_clock import added, spent_on

HELD_BATCHES = 3
"""Windows that a user's loop holds at a time, as long as it does not collect them: memory beyond those in work."""


class WindowTask(NamedTuple):
    """What travels to a worker."""

    window: Window
    settings: EpochSettings
    """Evaluated here: a schedule may be a function that cannot be sent."""
    slot: int = NOT_KEPT
    """The number of the slot that comes with it."""


class CropWork:
    """What workers do: the crops go into the slot that comes with the task; only targets travel back."""

    def __init__(self, maker: BatchMaker) -> None:
        self.maker = maker
        self.memory = MappedSlots()

    def __call__(self, task: WindowTask, descriptors: list[int]) -> tuple[Made, list[int]]:
        self.maker.epochs.learn(task.window.epoch, task.settings)
        with self.maker.clock.send:
            out = self.memory.images(task.slot, descriptors[0], *window_shape(self.maker, task.settings))
        return self.maker.make(Work(task.window, out)), []


def window_shape(maker: BatchMaker, settings: EpochSettings) -> tuple[int, int]:
    """Crops of a whole window of an epoch, and their size."""
    return settings.window_batches * maker.settings.batch_size, settings.size


@dataclass(eq=False, kw_only=True)
class CropJob(Job):
    window: Window
    settings: EpochSettings
    take: Callable[[int | None], Slot]
    slot: Slot | None = None

    def task(self, worker: int | None) -> tuple[WindowTask, tuple[int, ...]]:
        self.slot = self.slot or self.take(worker)
        return WindowTask(self.window, self.settings, self.slot.number), (self.slot.descriptor,)


def timed(job: Job, made: Made) -> Made:
    """What a job gave, with what is known of its time in the training process only."""
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

        self._pool = Pool(lambda: pickled(CropWork(maker.for_workers())), num_workers, prefetch_factor, drop)

    def make(self, windows: Iterator[Window]) -> Iterator[tuple[Window, Tensor, Made]]:
        """The windows with their crops and targets, in order. Raises what making them raises."""
        for job in self._pool.run(map(self._job, windows), self._here):
            made = timed(job, job.result)
            assert job.slot is not None
            yield job.window, self._buffers.lend(job.slot, sum(made.batches)), made

    def _job(self, window: Window) -> CropJob:
        settings = self._maker.epochs.at(window.epoch)
        take = partial(self._buffers.take, *window_shape(self._maker, settings))
        return CropJob(window=window, settings=settings, take=take)

    def _here(self, job: CropJob) -> Made:
        job.slot = job.slot or job.take(None)
        return self._maker.make(Work(job.window, job.slot.images()))

    def wait(self) -> None:
        """Wait until all workers are ready. Without this, windows are made in this process until the first one is."""
        self._pool.wait_for_workers()

    def end(self) -> None:
        """Let the processes go now: whoever keeps an error keeps its frames, and with them all that is used there."""
        self._pool.end()


def pickled(work: object) -> bytes:
    """For worker processes, which never see the user's script or notebook: what is defined there goes by value.

    Raises UsageError for what cannot be pickled.
    """
    try:
        return cast(bytes, cloudpickle.dumps(work))
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"what the loader was given cannot be sent to worker processes ({error}); leave out of it what belongs to "
            "this process, such as open files, locks and CUDA tensors, or use num_workers=0"
        ) from error
