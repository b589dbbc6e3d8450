"""The workers of a Ray cluster: actors."""

from __future__ import annotations

import contextlib
import os
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ferkd_data
from ferkd_data.builder.job import Job
from ferkd_data.builder.store_folder import folder_of
from ferkd_data.builder.workers.labeller import Labeller
from ferkd_data.builder.workers.messages import Computed, Message, Ready, Settled, WorkerLostError
from ferkd_data.builder.workers.ray_cluster import Fleet, log
from ferkd_data.errors import BuildError

PATIENCE_SECONDS = 60.0
"""Without any worker, before the user is told what the build waits for."""


class RayWorker:
    def __init__(self, number: int, fleet: Fleet, actor: Any) -> None:
        self.number = number
        self.fleet = fleet
        self.actor = actor
        self.name = f"worker {number}"
        self.call: Any = actor.open.options(name="get ready").remote()
        """What it was asked to do: to get ready, or a stream of messages. None while it is free."""
        self.is_ready = False

    def __str__(self) -> str:
        return self.name

    def place(self, ready: Ready) -> str:
        return f"{self.fleet.device} of node {ready.node}, process {ready.process}"

    def label(self, shard: int) -> None:
        self.call = self.actor.label.options(name=f"shard {shard}", num_returns="streaming").remote(shard)

    def settle(self) -> None:
        self.call = self.actor.settle.options(name="settle", num_returns="streaming").remote()

    def hear(self) -> Message:
        """Raises BuildError for an error in what runs there that is not the method's."""
        errors = self.fleet.ray.exceptions
        try:
            message: Message = self.fleet.ray.get(next(self.call) if self.is_ready else self.call)
        except errors.RayTaskError as error:
            raise BuildError(f"{self} failed: {last_line(error)} (--debug shows where)") from error
        except errors.RayError as error:
            raise WorkerLostError(f"lost ({type(error).__name__}: {last_line(error)})") from error
        if isinstance(message, Ready):
            self.is_ready = True
            self.name = f"worker {self.number} ({self.place(message)})"
        if isinstance(message, (Ready, Computed, Settled)):
            self.call = None
        return message

    def leave(self) -> None:
        pass

    def end(self, patience_seconds: float) -> None:
        """At once: an actor does not leave by itself."""
        with contextlib.suppress(self.fleet.ray.exceptions.RayError):
            self.fleet.ray.kill(self.actor)


class RayWorkers:
    """Of one build. Ray's own restarts are not used.

    They do not say how often a process died, and an actor that waits to be restarted keeps its shard.
    """

    when_none_gets_ready = "`ray status` and the logs of that node may say why"

    def __init__(self, job: Job, fleet: Fleet) -> None:
        self.job = replace(job, out=job.out.absolute() if isinstance(job.out, Path) else job.out)
        self.fleet = fleet
        self.token = uuid.uuid4().hex[:6]
        self.starts = 0
        self.patient_until = time.monotonic() + PATIENCE_SECONDS

    def room(self) -> int:
        return self.fleet.size()

    def start(self, number: int) -> RayWorker:
        """Ray finds a place for it, and waits for one where there is none."""
        self.starts += 1
        actor = self.fleet.ray.remote(Actor).options(
            name=f"ferkd-data {self.job.name} {self.token} worker {number} start {self.starts}",
            num_cpus=self.fleet.cpus,
            num_gpus=self.fleet.gpus,
        )
        here = {"driver_folder": str(Path.cwd()), "driver_version": ferkd_data.__version__}
        return RayWorker(number, self.fleet, actor.remote(self.job, self.fleet.device, **here))

    def with_news(self, workers: Sequence[RayWorker], seconds: float) -> list[RayWorker]:
        self._tell_of_waiting(workers)
        ray, calls = self.fleet.ray, [worker.call for worker in workers if worker.call is not None]
        if not calls:
            time.sleep(seconds)
            return []
        ray.wait(calls, num_returns=1, timeout=seconds)
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        spoke = {id(call) for call in ready}
        return [worker for worker in workers if id(worker.call) in spoke]

    def _tell_of_waiting(self, workers: Sequence[RayWorker]) -> None:
        if any(worker.is_ready for worker in workers):
            self.patient_until = float("inf")
        elif time.monotonic() > self.patient_until:
            self.patient_until = float("inf")
            log.warning("Ray has started no worker yet: each asks for %s; `ray status` shows what is free", self.fleet)


class Actor:
    """Runs in a process that Ray starts on some node."""

    def __init__(self, job: Job, device: str, *, driver_folder: str, driver_version: str) -> None:
        self.labeller = Labeller(job, device)
        self.driver_folder = driver_folder
        self.driver_version = driver_version

    def __repr__(self) -> str:
        """What Ray's dashboard calls it."""
        return f"ferkd-data {self.labeller.job.name} on {self.labeller.device}"

    def open(self) -> Message:
        return self.labeller.open(self._check_node)

    def label(self, shard: int) -> Iterator[Message]:
        yield from self.labeller.label(shard)

    def settle(self) -> Iterator[Message]:
        yield from self.labeller.settle()

    def _check_node(self) -> None:
        join_driver(self.driver_folder, self.driver_version)
        folder_of(self.labeller.job.out).join()


def join_driver(folder: str, version: str) -> None:
    """Raises BuildError where this node has another version of us."""
    if ferkd_data.__version__ != version:
        raise BuildError(
            f"node {platform.node()} has ferkd-data {ferkd_data.__version__}, the build was started by "
            f"{version}; install the same version on all nodes"
        )
    # Relative paths and modules of teachers mean what they mean to the driver, where the node has that folder.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        os.chdir(folder)


def last_line(error: Exception) -> str:
    """What Ray's long texts come to."""
    return str(error).strip().rpartition("\n")[2]
