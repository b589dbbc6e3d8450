"""What a worker does, in whichever process: it labels shards in a thread, and tells how far it is from another.

So that a teacher that hangs is noticed.
"""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from queue import SimpleQueue

import torch

from ferkd_data.builder.job import Job, open_tools
from ferkd_data.builder.labelling.write_behind import WriteBehind
from ferkd_data.builder.plan import open_plan
from ferkd_data.builder.state import ShardRecord
from ferkd_data.builder.store_folder import folder_of
from ferkd_data.builder.workers.messages import (
    Computed,
    Failed,
    Finished,
    Halved,
    Labelled,
    Message,
    Ready,
    Settled,
    Slow,
)

REPORT_SECONDS = 1.0
"""How often a worker tells how far it is: a driver hears a thousand of them."""


class Labeller:
    def __init__(self, job: Job, device: str) -> None:
        self.job = job
        self.device = device
        self.watch = _Watch(sign_of_life=job.teacher_timeout is not None)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ferkd-data-label")
        self._open_for_life = ExitStack()
        self._behind: WriteBehind
        """There when it is open."""

    def open(self, check: Callable[[], None] = lambda: None) -> Message:
        """Load the teachers, after `check`. Comes before all else."""
        error = self._thread.submit(self._open, check).exception()
        return Ready(platform.node(), os.getpid()) if error is None else failed(error)

    def label(self, shard: int) -> Iterator[Message]:
        """Ends when another can be labelled, or none ever."""
        self.watch.begin()
        return self._tell(self._thread.submit(self._behind.label, shard, self.watch.labelled), Computed())

    def settle(self) -> Iterator[Message]:
        """Ends when the record of every shard is saved, or never will be."""
        return self._tell(self._thread.submit(self._behind.settle), Settled())

    def _tell(self, done: Future[None], last: Message) -> Iterator[Message]:
        limit = self.job.teacher_timeout
        while not _is_done(done, min(REPORT_SECONDS, limit or REPORT_SECONDS)):
            if limit is not None and (teacher := self.watch.late(limit)):
                yield Slow(teacher)
                return
            yield from self.watch.news()
        yield from self.watch.news()
        error = done.exception()
        yield last if error is None else failed(error)

    def _open(self, check: Callable[[], None]) -> None:
        check()
        torch.set_num_threads(self.job.threads)
        tools = self._open_for_life.enter_context(open_tools(self.job, self.device, observer=self.watch))
        folder = folder_of(self.job.out)
        behind = WriteBehind(folder, open_plan(folder.path), tools, self.watch.saved)
        self._behind = self._open_for_life.enter_context(behind)


class _Watch:
    """What the labelling thread is at, for the thread that tells to look at."""

    def __init__(self, *, sign_of_life: bool) -> None:
        self.sign_of_life = sign_of_life
        self.teacher = ""
        self.since = 0.0
        self.crops = self.told = self.rejects = 0
        self.queue: SimpleQueue[Halved | Finished] = SimpleQueue()

    def asking(self, teacher: str) -> None:
        self.since = time.monotonic()
        self.teacher = teacher

    def answered(self) -> None:
        self.teacher = ""

    def halved(self, teacher: str, crops: int) -> None:
        self.queue.put(Halved(teacher, crops))

    def saved(self, record: ShardRecord) -> None:
        self.queue.put(Finished(record.index))

    def late(self, limit_seconds: float) -> str:
        """The teacher that is waited for longer than that, or nothing."""
        teacher = self.teacher
        return teacher if time.monotonic() - self.since > limit_seconds else ""

    def begin(self) -> None:
        self.crops = self.told = self.rejects = 0

    def labelled(self, crops: int, rejects: int) -> None:
        self.rejects = rejects
        self.crops += crops

    def news(self) -> Iterator[Message]:
        """What happened since this was last asked for."""
        while not self.queue.empty():
            yield self.queue.get()
        crops = self.crops
        if crops != self.told or self.sign_of_life:
            yield Labelled(crops - self.told, self.rejects)
        self.told = crops


def _is_done(future: Future[None], seconds: float) -> bool:
    return not wait([future], timeout=seconds).not_done


def failed(error: BaseException) -> Failed:
    return Failed(type(error).__name__, str(error), "".join(traceback.format_exception(error)))
