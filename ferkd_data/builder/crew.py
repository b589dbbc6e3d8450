"""The engine of many processes on one machine: a driver that hands out shards, and sees to workers that die."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType

from ferkd_data.builder.backlog import Backlog
from ferkd_data.builder.failures import failure, too_slow
from ferkd_data.builder.job import Job
from ferkd_data.builder.messages import Answered, Asking, Failed, Finished, Halved, Labelled, Message, Ready
from ferkd_data.builder.progress import ProgressCounter
from ferkd_data.builder.stop import Stop
from ferkd_data.builder.store_folder import folder_of
from ferkd_data.builder.worker import work
from ferkd_data.errors import BuildError

DEATHS_AT_START = 3
"""So many deaths in a row before any worker was ready mean that none will be."""
POLL_SECONDS = 0.5
LEAVE_SECONDS = 30.0
"""How long a worker may take to leave when there is no more to do."""


@dataclass(kw_only=True, eq=False)
class Member:
    number: int
    device: str
    process: SpawnProcess
    connection: Connection
    shard: int | None = None
    ready: bool = False
    asking: str = ""
    """The teacher that it waits for."""
    asked_at: float = 0.0

    def __str__(self) -> str:
        return f"worker {self.number} ({self.device}, process {self.process.pid})"


class Crew:
    """Workers, one for each of `devices`; a context that ends them all when it is left."""

    def __init__(self, job: Job, devices: Sequence[str], counter: ProgressCounter, stop: Stop) -> None:
        self.job = job
        self.devices = devices
        self.folder = folder_of(job.out)
        self.counter = counter
        self.stop = stop
        self.members: list[Member] = []
        self.idle: list[Member] = []
        self.todo = Backlog()
        self.deaths_at_start = 0
        self.context = multiprocessing.get_context("spawn")

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members:
            with contextlib.suppress(OSError):
                member.connection.send(None)
        for member in self.members:
            if kind is None:
                member.process.join(LEAVE_SECONDS)
            member.process.kill()
            # A process that hangs in a driver call of the system may not even die.
            member.process.join(LEAVE_SECONDS)
            member.connection.close()

    def label(self, shards: Sequence[int]) -> None:
        """Returns when each of `shards` has its record. Raises what a worker raised, or BuildError."""
        self.todo.add(shards)
        for number, device in enumerate(self.devices[: len(self.todo)]):
            self._start(number, device)
        while self.todo or any(member.shard is not None for member in self.members):
            self._check_stop()
            while self.todo and self.idle and not self.stop.requested:
                self._give(self.idle.pop())
            busy = {member.connection: member for member in self.members}
            for connection in wait(list(busy), timeout=POLL_SECONDS):
                self._hear(busy[connection])  # type: ignore[index]
            self._check_clocks()
            self.counter.tick()

    def _start(self, number: int, device: str) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(theirs, self.job, device), daemon=True)
        with contextlib.suppress(BrokenPipeError):  # it died while it was born; its connection will say so
            process.start()
        theirs.close()
        self.members.append(Member(number=number, device=device, process=process, connection=ours))

    def _give(self, member: Member) -> None:
        shard = self.todo.take()
        member.shard = shard
        self.counter.shard_begun(shard, member.number)
        with contextlib.suppress(OSError):  # it died while it was idle; its connection will say so
            member.connection.send(shard)

    def _hear(self, member: Member) -> None:
        try:
            message: Message = member.connection.recv()
        except (EOFError, OSError):
            self._bury(member)
            return
        if isinstance(message, Ready):
            member.ready = True
            self.deaths_at_start = 0
            self.counter.worker_started(member.number, member.device)
            self.idle.append(member)
        elif isinstance(message, Labelled) and member.shard is not None:
            member.asking = ""
            self.counter.batch(member.shard, message.crops, message.rejects, member.number)
        elif isinstance(message, Halved):
            self.counter.halved(message.teacher, message.crops, member.number)
        elif isinstance(message, (Asking, Answered)):
            member.asking = message.teacher if isinstance(message, Asking) else ""
            member.asked_at = time.monotonic()
        elif isinstance(message, Finished):
            self._finish(member, message.shard)
        elif isinstance(message, Failed):
            raise failure(message, f"shard {member.shard}: {member}" if member.shard is not None else str(member))

    def _check_stop(self) -> None:
        in_work = any(member.shard is not None for member in self.members)
        if self.stop.expired or (self.stop.requested and not in_work):
            raise self.stop.error()

    def _check_clocks(self) -> None:
        """Raise TeacherError for a teacher that lets a worker wait too long; the worker ends with the crew."""
        limit = self.job.teacher_timeout
        for member in self.members if limit is not None else ():
            late = bool(member.asking) and time.monotonic() - member.asked_at > (limit or 0)
            if late and not member.connection.poll():
                raise too_slow(member.asking, member.shard, limit or 0, str(member))

    def _finish(self, member: Member, shard: int) -> None:
        record = self.folder.record(shard)
        if record is None:
            raise BuildError(f"shard {shard}: {member} finished it, but its files are not in {self.job.out}")
        member.shard = None
        self.idle.append(member)
        self.counter.shard_done(record, member.number)

    def _bury(self, member: Member) -> None:
        """Give its shard to another, and its place to a new worker. Raises BuildError when that has no prospect."""
        member.process.join(LEAVE_SECONDS)
        member.process.kill()  # one that closed its pipe and does not end would hold the build
        member.process.join(LEAVE_SECONDS)
        self.members.remove(member)
        if member in self.idle:
            self.idle.remove(member)
        how = _how(member.process.exitcode)
        self.counter.worker_died(member.number, how, member.shard)
        if not member.ready:
            self.deaths_at_start += 1
            if self.deaths_at_start >= DEATHS_AT_START:
                raise BuildError(
                    f"{self.deaths_at_start} workers in a row died before they were ready, the last {how}; try "
                    "--processes 1 (in a script of your own, build under `if __name__ == '__main__':`)"
                )
        if member.shard is not None:
            self.todo.give_back(member.shard, f"{member} {how}")
        self._start(member.number, member.device)


def _how(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with status {exitcode}"
    return f"killed by {signal.Signals(-exitcode).name}"
