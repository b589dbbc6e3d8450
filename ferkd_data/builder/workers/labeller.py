"""A worker's side of the protocol, in whichever process it runs.

Two threads share a `Labeller`. One labels; it owns the tools, the shard in work and all PyTorch calls. The other, which
is the process's main thread, answers the driver: it reads how far the first one is once a second, so that a teacher
that hangs is noticed and reported.
"""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from queue import SimpleQueue
from typing import TypeVar

import torch

from ferkd_data.builder.labelling.job import Job, Tools, open_tools
from ferkd_data.builder.labelling.measuring import measure
from ferkd_data.builder.labelling.write_behind import WriteBehind
from ferkd_data.builder.plan import open_plan
from ferkd_data.builder.shard_files import ShardRecord
from ferkd_data.builder.store_files import folder_of
from ferkd_data.builder.workers.messages import (
    Computed,
    Failed,
    Halved,
    Labelled,
    Measured,
    Message,
    Ready,
    Settled,
    ShardSaved,
    Slow,
)
from ferkd_data.images import ImageRef
from ferkd_data.teachers import TeacherSpec

Result = TypeVar("Result")

REPORT_SECONDS = 1.0
"""Seconds between two reports of a worker: a driver may hear a thousand of them."""


class Labeller:
    """A worker's labelling thread, and the messages about its work. One request at a time, after `open`."""

    def __init__(self, job: Job, device: str) -> None:
        self.job = job
        self.device = device
        self.watch = _Watch(sign_of_life=job.resources.teacher_timeout is not None)
        # One thread for the worker's whole life: PyTorch keeps the current device, inference mode and the number of
        # threads for each thread by itself.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ferkd-data-label")
        # Never closed: the end of the process ends all that is in it, even where a teacher hangs.
        self._open_for_life = ExitStack()
        self._tools: Tools
        self._behind: WriteBehind
        """Set by `open`, unless the job has no OUT."""

    def open(self, check: Callable[[], None] = lambda: None) -> Message:
        """Call `check`, then load the teachers. Must come before everything else."""
        error = self._thread.submit(self._open, check).exception()
        return Ready(platform.node(), os.getpid()) if error is None else failed(error)

    def label(self, shard: int) -> Iterator[Message]:
        """Yield messages until another shard can be labelled, or none ever."""
        self.watch.begin()
        done = self._thread.submit(self._behind.label, shard, self.watch.labelled)
        return self._tell(done, lambda _: Computed())

    def settle(self) -> Iterator[Message]:
        """Yield messages until the record of every shard is saved, or never will be."""
        return self._tell(self._thread.submit(self._behind.settle), lambda _: Settled())

    def measure(self, refs: Sequence[ImageRef], location: str) -> Iterator[Message]:
        """Yield messages until the labelling of these images is timed."""
        return self._tell(self._thread.submit(measure, self._tools, refs, location), Measured)

    def _tell(self, done: Future[Result], last: Callable[[Result], Message]) -> Iterator[Message]:
        limit = self.job.resources.teacher_timeout
        while not _is_done(done, min(REPORT_SECONDS, limit or REPORT_SECONDS)):
            if limit is not None and (teacher := self.watch.late(limit)):
                yield Slow(teacher)
                return
            yield from self.watch.news()
        # Once more, for what happened between the last look and the end.
        yield from self.watch.news()
        error = done.exception()
        yield last(done.result()) if error is None else failed(error)

    def _open(self, check: Callable[[], None]) -> None:
        """Open the tools, in the labelling thread, whose number of PyTorch threads is set here."""
        check()
        torch.set_num_threads(self.job.resources.compute_threads)
        self._tools = self._open_for_life.enter_context(open_tools(self.job, self.device, observer=self.watch))
        if self.job.out is not None:
            folder = folder_of(self.job.out)
            behind = WriteBehind(folder, open_plan(folder.path), self._tools, self.watch.saved)
            self._behind = self._open_for_life.enter_context(behind)


class _Watch:
    """Progress of the labelling thread. Written by that thread, read by the one that reports.

    Each attribute is one reference, replaced as a whole, so reading needs no lock: an old value is as good.
    """

    def __init__(self, *, sign_of_life: bool) -> None:
        self.sign_of_life = sign_of_life
        self.teachers: Sequence[TeacherSpec] = ()
        self.since = 0.0
        self.crops = self.reported = self.rejects = 0
        self.queue: SimpleQueue[Halved | ShardSaved] = SimpleQueue()

    def asking(self, teachers: Sequence[TeacherSpec]) -> None:
        # The time first: a reader that sees the new teachers must not see the old time.
        self.since = time.monotonic()
        self.teachers = teachers

    def answered(self) -> None:
        self.teachers = ()

    def halved(self, teacher: str, crops: int) -> None:
        self.queue.put(Halved(teacher, crops))

    def saved(self, record: ShardRecord) -> None:
        self.queue.put(ShardSaved(record.index))

    def late(self, limit_seconds: float) -> str:
        """Return the names of teachers that are waited for longer than that, or an empty string."""
        # The teachers before the time, in reverse to `asking`: whoever sees the new teachers sees the new time.
        teachers = self.teachers
        return ", ".join(map(str, teachers)) if time.monotonic() - self.since > limit_seconds else ""

    def begin(self) -> None:
        """Start counting anew. Called between shards, when the labelling thread is idle."""
        self.crops = self.reported = self.rejects = 0

    def labelled(self, crops: int, rejects: int) -> None:
        self.rejects = rejects
        self.crops += crops

    def news(self) -> Iterator[Message]:
        """Yield what happened since the last call."""
        while not self.queue.empty():
            yield self.queue.get()
        # Read once: the labelling thread may add to it between the lines below.
        crops = self.crops
        if crops != self.reported or self.sign_of_life:
            yield Labelled(crops - self.reported, self.rejects)
        self.reported = crops


def _is_done(future: Future[Result], seconds: float) -> bool:
    return not wait([future], timeout=seconds).not_done


def failed(error: BaseException) -> Failed:
    return Failed(type(error).__name__, str(error), "".join(traceback.format_exception(error)))
