"""A worker process: labels the shards that its driver names, one after the other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from multiprocessing.connection import Connection

import torch

from ferkd_data.builder.job import Job, open_tools
from ferkd_data.builder.local import label_one
from ferkd_data.builder.messages import Answered, Asking, Failed, Finished, Halved, Labelled, Ready
from ferkd_data.builder.plan import open_plan
from ferkd_data.builder.store_folder import folder_of


def work(driver: Connection, job: Job, device: str) -> None:
    """Returns when the driver has no more shards, or is gone."""
    # A batch system, and Ctrl-C, signal all processes of a job; the driver decides what the signal means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    torch.set_num_threads(job.threads)
    try:
        _label(driver, job, device)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        driver.send(Failed(type(error).__name__, str(error), traceback.format_exc()))


def _label(driver: Connection, job: Job, device: str) -> None:
    folder = folder_of(job.out)
    plan = open_plan(folder.path)
    observer = _Telling(driver, watched=job.teacher_timeout is not None)
    with open_tools(job, device, observer=observer) as tools:
        driver.send(Ready())
        while (shard := driver.recv()) is not None:
            record = label_one(folder, plan, tools, shard, lambda *counts: driver.send(Labelled(*counts)))
            folder.save(record)
            driver.send(Finished(shard))


class _Telling:
    """Passes on to the driver what the teachers are at."""

    def __init__(self, driver: Connection, *, watched: bool) -> None:
        self.driver = driver
        self.watched = watched

    def asking(self, teacher: str) -> None:
        if self.watched:
            self.driver.send(Asking(teacher))

    def answered(self) -> None:
        if self.watched:
            self.driver.send(Answered())

    def halved(self, teacher: str, crops: int) -> None:
        self.driver.send(Halved(teacher, crops))


def _end_with_the_driver() -> None:
    """A driver that was killed says nothing, and what runs on without it would disturb the next."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
