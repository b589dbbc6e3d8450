"""The engine of a Ray cluster: actors that label, and a driver that calls each for one shard after the other."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ferkd_data
from ferkd_data.builder.backlog import Backlog
from ferkd_data.builder.failures import failure, too_slow
from ferkd_data.builder.job import Job
from ferkd_data.builder.messages import Failed, Finished, Halved, Labelled, Message, Opened, Slow
from ferkd_data.builder.progress import ProgressCounter
from ferkd_data.builder.ray_cluster import Fleet, log
from ferkd_data.builder.ray_worker import Labeller
from ferkd_data.builder.state import ShardRecord
from ferkd_data.builder.stop import Stop
from ferkd_data.builder.store_folder import folder_of
from ferkd_data.errors import BuildError

DEATHS_AT_START = 3
"""So many deaths of one worker in a row before it was ready mean that it never will be."""
POLL_SECONDS = 0.5
SIZE_SECONDS = 10.0
"""How often the cluster is asked what it has room for."""
PATIENCE_SECONDS = 60.0
"""Without any worker, before the user is told what the build waits for."""
VISIBLE_SECONDS = 90.0
"""A network file system may show a file that another node wrote so much later."""


@dataclass(kw_only=True, eq=False)
class Member:
    number: int
    name: str
    actor: Any = None
    call: Any = None
    """What it was asked to do: to get ready, or a stream of messages about `shard`. None while it is idle."""
    shard: int | None = None
    starts: int = 0
    deaths_at_start: int = 0

    def __str__(self) -> str:
        return self.name


class RayCrew:
    """Actors of one build; a context that ends them all when it is left."""

    def __init__(self, job: Job, fleet: Fleet, counter: ProgressCounter, stop: Stop) -> None:
        self.job = replace(job, out=job.out.absolute() if isinstance(job.out, Path) else job.out)
        self.fleet = fleet
        self.ray = fleet.ray
        self.folder = folder_of(job.out)
        self.counter = counter
        self.stop = stop
        self.todo = Backlog()
        self.members: list[Member] = []
        self.token = uuid.uuid4().hex[:6]
        self.size = 0
        self.size_from = 0.0
        self.patient_until: float | None = time.monotonic() + PATIENCE_SECONDS

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members:
            self._kill(member)

    def label(self, shards: Sequence[int]) -> None:
        """Returns when each of `shards` has its record. Raises what a worker raised, or BuildError."""
        self.todo.add(shards)
        while self.todo or self._in_work():
            self._check_stop()
            self._grow()
            for member in self.members:
                if member.call is None and self.todo and not self.stop.requested:
                    self._give(member)
            for member in self._with_news():
                self._hear(member)
            self.counter.tick()

    def _in_work(self) -> int:
        return sum(member.shard is not None for member in self.members)

    def _check_stop(self) -> None:
        if self.stop.expired or (self.stop.requested and not self._in_work()):
            raise self.stop.error()

    def _grow(self) -> None:
        now = time.monotonic()
        if now - self.size_from > SIZE_SECONDS or not self.members:
            self.size, self.size_from = self.fleet.size(), now
        while len(self.members) < min(self.size, len(self.todo) + self._in_work()):
            self.members.append(Member(number=len(self.members), name=f"worker {len(self.members)}"))
            self._start(self.members[-1])
        if self.patient_until is not None and now > self.patient_until:
            self.patient_until = None
            log.warning("Ray has started no worker yet: each asks for %s; `ray status` shows what is free", self.fleet)

    def _start(self, member: Member) -> None:
        """Ray finds a place for it, and waits for one where there is none."""
        member.starts += 1
        actor = self.ray.remote(Labeller).options(
            name=f"ferkd-data {self.job.name} {self.token} worker {member.number} start {member.starts}",
            num_cpus=self.fleet.cpus,
            num_gpus=self.fleet.gpus,
        )
        member.actor = actor.remote(
            self.job, self.fleet.device, driver_folder=str(Path.cwd()), driver_version=ferkd_data.__version__
        )
        member.call = member.actor.open.options(name="get ready").remote()

    def _give(self, member: Member) -> None:
        member.shard = self.todo.take()
        self.counter.shard_begun(member.shard, member.number)
        label = member.actor.label.options(name=f"shard {member.shard}", num_returns="streaming")
        member.call = label.remote(member.shard)

    def _with_news(self) -> list[Member]:
        """Waits a little for some."""
        calls = [member.call for member in self.members if member.call is not None]
        self.ray.wait(calls, num_returns=1, timeout=POLL_SECONDS)
        ready, _ = self.ray.wait(calls, num_returns=len(calls), timeout=0)
        spoke = {id(call) for call in ready}
        return [member for member in self.members if id(member.call) in spoke]

    def _hear(self, member: Member) -> None:
        errors = self.ray.exceptions
        try:
            message: Message = self.ray.get(member.call if member.shard is None else next(member.call))
        except errors.RayTaskError as error:
            raise BuildError(f"{member} failed: {_last_line(error)} (--debug shows where)") from error
        except errors.RayError as error:
            self._bury(member, error)
            return
        if isinstance(message, Opened):
            member.deaths_at_start = 0
            place = f"{self.fleet.device} of node {message.node}, process {message.process}"
            member.name = f"worker {member.number} ({place})"
            member.call = None
            self.patient_until = None
            self.counter.worker_started(member.number, place)
        elif isinstance(message, Labelled) and member.shard is not None:
            self.counter.batch(member.shard, message.crops, message.rejects, member.number)
        elif isinstance(message, Halved):
            self.counter.halved(message.teacher, message.crops, member.number)
        elif isinstance(message, Finished):
            self._finish(member, message.shard)
        elif isinstance(message, Slow):
            raise too_slow(message.teacher, member.shard, self.job.teacher_timeout or 0, str(member))
        elif isinstance(message, Failed):
            raise failure(message, f"shard {member.shard}: {member}" if member.shard is not None else str(member))

    def _finish(self, member: Member, shard: int) -> None:
        record = self._see_record(shard)
        if record is None:
            raise BuildError(f"shard {shard}: {member} finished it, but its files are not in {self.job.out}")
        member.call = member.shard = None
        self.counter.shard_done(record, member.number)

    def _see_record(self, shard: int) -> ShardRecord | None:
        deadline = time.monotonic() + VISIBLE_SECONDS
        while (record := self.folder.record(shard)) is None and time.monotonic() < deadline:
            # A network file system looks again for a name that it knows as missing when its folder is listed.
            for path in (self.folder.path / "shards", self.folder.out / "labels", self.folder.out / "shards"):
                if path.is_dir():
                    list(path.iterdir())
            time.sleep(POLL_SECONDS)
        return record

    def _bury(self, member: Member, error: Exception) -> None:
        """Its process or node died, or cannot be reached: a new actor takes its place, and any worker its shard.

        Ray's own restarts do not say how often a process died, and an actor that waits to be restarted keeps its shard.
        """
        if self.stop.requested:  # who stops a batch job often signals all its processes, Ray's own too
            raise self.stop.error()
        how = f"{member} ({type(error).__name__})"
        self.counter.worker_died(member.number, how, member.shard)
        self._kill(member)
        if member.shard is not None:
            shard, member.shard = member.shard, None
            self.todo.give_back(shard, how)
        else:
            member.deaths_at_start += 1
            if member.deaths_at_start >= DEATHS_AT_START:
                raise BuildError(
                    f"{DEATHS_AT_START} workers in a row died before they were ready, the last was {how}: "
                    f"{_last_line(error)}"
                ) from error
        self._start(member)

    def _kill(self, member: Member) -> None:
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.kill(member.actor)


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]
