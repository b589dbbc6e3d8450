"""Workers on a Ray cluster: actors, each of which streams its messages back."""

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
from ferkd_data.builder.labelling.job import Job
from ferkd_data.builder.store_files import folder_of
from ferkd_data.builder.workers.labeller import Labeller
from ferkd_data.builder.workers.messages import Computed, Measured, Message, Ready, Settled, WorkerLostError
from ferkd_data.builder.workers.ray_cluster import Cluster, log
from ferkd_data.errors import BuildError
from ferkd_data.images import ImageRef

NOTICE_SECONDS = 60.0
"""Seconds without any worker before the user is told what the build waits for."""


class RayWorker:
    """An actor, and the call that it is answering."""

    def __init__(self, number: int, cluster: Cluster, actor: Any) -> None:
        self.number = number
        self.cluster = cluster
        self.actor = actor
        self.name = f"worker {number}"
        # Not waited for: Ray may first have to find, or start, a node.
        self.call: Any = actor.open.options(name="get ready").remote()
        """The call to get ready, or a stream of messages; None while the worker is free."""
        self.is_ready = False

    def __str__(self) -> str:
        return self.name

    def location(self, ready: Ready) -> str:
        return f"{self.cluster.device} of node {ready.node}, process {ready.process}"

    def label(self, shard: int) -> None:
        self.call = self.actor.label.options(name=f"shard {shard}", num_returns="streaming").remote(shard)

    def settle(self) -> None:
        self.call = self.actor.settle.options(name="settle", num_returns="streaming").remote()

    def measure(self, refs: Sequence[ImageRef]) -> None:
        self.call = self.actor.measure.options(name="measure", num_returns="streaming").remote(refs)

    def receive(self) -> Message:
        """Wait for the next message and return it. Raises WorkerLostError, and BuildError for an error of the actor."""
        errors = self.cluster.ray.exceptions
        try:
            # A streaming call is an iterator of references; `open` is an ordinary call with one.
            message: Message = self.cluster.ray.get(next(self.call) if self.is_ready else self.call)
        except errors.RayTaskError as error:
            raise BuildError(f"{self} failed: {last_line(error)} (--debug shows where)") from error
        except errors.RayError as error:
            raise WorkerLostError(f"lost ({type(error).__name__}: {last_line(error)})") from error
        if isinstance(message, Ready):
            self.is_ready = True
            self.name = f"worker {self.number} ({self.location(message)})"
        # These end a request (see `messages`). Slow and Failed end the build, so that the call is of no more interest.
        if isinstance(message, (Ready, Computed, Settled, Measured)):
            self.call = None
        return message

    def leave(self) -> None:
        pass

    def end(self, wait_seconds: float) -> None:
        """Kill the actor at once, since it does not leave by itself."""
        with contextlib.suppress(self.cluster.ray.exceptions.RayError):
            self.cluster.ray.kill(self.actor)


class RayWorkers:
    """Starts the actors of one build.

    Ray's own restarts are not used: they do not say how often a process died, and an actor that waits to be restarted
    keeps its shard.
    """

    when_none_gets_ready = "`ray status` and the logs of that node may say why"

    def __init__(self, job: Job, cluster: Cluster) -> None:
        self.job = replace(job, out=job.out.absolute() if isinstance(job.out, Path) else job.out)
        self.cluster = cluster
        self.token = uuid.uuid4().hex[:6]
        self.starts = 0
        self.notice_at = time.monotonic() + NOTICE_SECONDS

    def room(self) -> int:
        return self.cluster.size()

    def start(self, number: int) -> RayWorker:
        """Ask Ray for an actor. Ray chooses its node, and waits where no node has room."""
        self.starts += 1
        actor = self.cluster.ray.remote(Actor).options(
            # Unique in the cluster, also beside other builds, and beside the dead actor whose place this one takes.
            name=f"ferkd-data {self.job.name} {self.token} worker {number} start {self.starts}",
            num_cpus=self.cluster.cpus,
            num_gpus=self.cluster.gpus,
        )
        here = {"driver_folder": str(Path.cwd()), "driver_version": ferkd_data.__version__}
        return RayWorker(number, self.cluster, actor.remote(self.job, self.cluster.device, **here))

    def with_messages(self, workers: Sequence[RayWorker], seconds: float) -> list[RayWorker]:
        self._tell_of_waiting(workers)
        ray, calls = self.cluster.ray, [worker.call for worker in workers if worker.call is not None]
        if not calls:
            time.sleep(seconds)
            return []
        # Ray returns at most `num_returns`: the first call waits for any news, the second collects all there is.
        ray.wait(calls, num_returns=1, timeout=seconds)
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        ready = {id(call) for call in ready}
        return [worker for worker in workers if id(worker.call) in ready]

    def _tell_of_waiting(self, workers: Sequence[RayWorker]) -> None:
        if any(worker.is_ready for worker in workers):
            self.notice_at = float("inf")
        elif time.monotonic() > self.notice_at:
            self.notice_at = float("inf")
            log.warning(
                "Ray has started no worker yet: each asks for %s; `ray status` shows what is free", self.cluster
            )


class Actor:
    """The worker itself, in a process that Ray starts on some node."""

    def __init__(self, job: Job, device: str, *, driver_folder: str, driver_version: str) -> None:
        self.labeller = Labeller(job, device)
        self.driver_folder = driver_folder
        self.driver_version = driver_version

    def __repr__(self) -> str:
        """Return the name for Ray's dashboard."""
        return f"ferkd-data {self.labeller.job.name} on {self.labeller.device}"

    # Ray calls an actor's methods one at a time, in one thread: the reporting one of `Labeller`.
    def open(self) -> Message:
        return self.labeller.open(self._check_node)

    def label(self, shard: int) -> Iterator[Message]:
        yield from self.labeller.label(shard)

    def settle(self) -> Iterator[Message]:
        yield from self.labeller.settle()

    def measure(self, refs: Sequence[ImageRef]) -> Iterator[Message]:
        yield from self.labeller.measure(refs, f"{self.labeller.device} of node {platform.node()}")

    def _check_node(self) -> None:
        """Check this node. Raises BuildError where it has another version, or does not see OUT."""
        join_driver(self.driver_folder, self.driver_version)
        if self.labeller.job.out is not None:
            folder_of(self.labeller.job.out).files.join()


def join_driver(folder: str, version: str) -> None:
    """Change to the driver's working folder. Raises BuildError where this node has another version of ferkd-data."""
    if ferkd_data.__version__ != version:
        raise BuildError(
            f"node {platform.node()} has ferkd-data {ferkd_data.__version__}, the build was started by "
            f"{version}; install the same version on all nodes"
        )
    # Relative paths and modules of teachers mean what they mean to the driver, where the node has that folder.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        os.chdir(folder)


def last_line(error: Exception) -> str:
    """Return the last line of one of Ray's long messages, which holds the reason."""
    return str(error).strip().rpartition("\n")[2]
