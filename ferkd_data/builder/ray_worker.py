"""A worker of a build on a Ray cluster: what runs in the actor.

The actor's own thread answers Ray; a second one loads the teachers and labels, so that a teacher that hangs is noticed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import SimpleQueue

import torch

import ferkd_data
from ferkd_data.builder.job import Job, open_tools
from ferkd_data.builder.label_shard import Tools
from ferkd_data.builder.local import label_one
from ferkd_data.builder.messages import Failed, Finished, Halved, Labelled, Message, Opened, Slow
from ferkd_data.builder.plan import open_plan
from ferkd_data.builder.store_folder import folder_of
from ferkd_data.errors import BuildError

REPORT_SECONDS = 1.0
"""How often a worker tells how far it is: a driver hears a thousand of them."""


class Labeller:
    def __init__(self, job: Job, device: str, *, driver_folder: str, driver_version: str) -> None:
        self.job = job
        self.device = device
        self.driver_folder = driver_folder
        self.driver_version = driver_version
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="ferkd-data-label")
        self.watch = _Watch()
        self.tools: Tools | None = None
        self.open_for_life = contextlib.ExitStack()

    def __repr__(self) -> str:
        """What Ray's dashboard calls it."""
        return f"ferkd-data {self.job.name} on {self.device}"

    def open(self) -> Message:
        """Load the teachers, where that has not been done."""
        loaded = self.thread.submit(self._open)
        error = loaded.exception()
        return Opened(platform.node(), os.getpid()) if error is None else _failed(error)

    def label(self, shard: int) -> Iterator[Message]:
        """Ends when the record of the shard is saved, or never will be."""
        labelled = self.thread.submit(self._label, shard)
        limit = self.job.teacher_timeout
        while not _is_done(labelled, min(REPORT_SECONDS, limit or REPORT_SECONDS)):
            if limit is not None and (teacher := self.watch.late(limit)):
                yield Slow(teacher)
                return
            yield from self.watch.news()
        yield from self.watch.news()
        error = labelled.exception()
        yield Finished(shard) if error is None else _failed(error)

    def _open(self) -> Tools:
        if self.tools is None:
            self._check_node()
            torch.set_num_threads(self.job.threads)
            self.tools = self.open_for_life.enter_context(open_tools(self.job, self.device, observer=self.watch))
        return self.tools

    def _check_node(self) -> None:
        if ferkd_data.__version__ != self.driver_version:
            raise BuildError(
                f"node {platform.node()} has ferkd-data {ferkd_data.__version__}, the build was started by "
                f"{self.driver_version}; install the same version on all nodes"
            )
        # Relative paths and modules of teachers mean what they mean to the driver, where the node has that folder.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.chdir(self.driver_folder)
        folder_of(self.job.out).join()

    def _label(self, shard: int) -> None:
        tools = self._open()
        folder = folder_of(self.job.out)
        self.watch.begin()
        folder.save(label_one(folder, open_plan(folder.path), tools, shard, self.watch.labelled))


class _Watch:
    """What the labelling thread is at, for the actor's own thread to look at."""

    def __init__(self) -> None:
        self.teacher = ""
        self.since = 0.0
        self.crops = self.told = self.rejects = 0
        self.halvings: SimpleQueue[Halved] = SimpleQueue()

    def asking(self, teacher: str) -> None:
        self.since = time.monotonic()
        self.teacher = teacher

    def answered(self) -> None:
        self.teacher = ""

    def halved(self, teacher: str, crops: int) -> None:
        self.halvings.put(Halved(teacher, crops))

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
        while not self.halvings.empty():
            yield self.halvings.get()
        crops = self.crops
        if crops != self.told:
            yield Labelled(crops - self.told, self.rejects)
        self.told = crops


def _is_done(labelled: Future[None], seconds: float) -> bool:
    return not wait([labelled], timeout=seconds).not_done


def _failed(error: BaseException) -> Failed:
    return Failed(type(error).__name__, str(error), "".join(traceback.format_exception(error)))
