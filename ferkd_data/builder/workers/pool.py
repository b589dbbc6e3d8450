"""The driver's side of a build with several workers: `WorkerPool`.

The driver has one thread. It gives each free worker a shard, waits for messages of any of them, and replaces a worker
that dies; the shards that were with it go back to the `ShardQueue`. A shard is done when the driver itself sees its
record in OUT, whatever the worker says: workers may be on other machines.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic

from ferkd_data import errors
from ferkd_data.builder.state import BuildFolder
from ferkd_data.builder.stop import Stop
from ferkd_data.builder.watch.progress import ProgressCounter
from ferkd_data.builder.workers.messages import (
    AnyWorker,
    Computed,
    Failed,
    Halved,
    Labelled,
    Ready,
    Settled,
    ShardSaved,
    Slow,
    WorkerLostError,
    Workers,
)
from ferkd_data.errors import BuildError, DeviceFailedError, FerkdError, TeacherError

DEATHS_PER_SHARD = 3
"""Workers that may die with a shard before the build gives it up."""
DEATHS_AT_START = 3
"""Deaths of one worker in a row, before it was ready, after which the build ends."""
POLL_SECONDS = 0.5
LEAVE_SECONDS = 30.0
"""Time that a worker may take to leave when there is no more to do."""
ROOM_SECONDS = 10.0
"""Seconds after which the driver asks again how many workers there is room for."""
VISIBLE_SECONDS = 90.0
"""Delay after which a network file system shows a file that another node wrote."""
SILENT_SECONDS = 10.0
"""Silence beyond the teacher timeout after which a worker counts as hanging: it should report every second."""


class ShardQueue:
    """Shards that wait for a worker, and how often a worker died with each."""

    def __init__(self) -> None:
        self.shards: deque[int] = deque()
        self.deaths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.shards)

    def add(self, shards: Sequence[int]) -> None:
        self.shards.extend(shards)

    def take(self) -> int:
        return self.shards.popleft()

    def give_back(self, shard: int, how: str) -> None:
        """Put a shard whose worker died in front. Raises BuildError where that happened too often."""
        self.deaths[shard] += 1
        if self.deaths[shard] >= DEATHS_PER_SHARD:
            raise BuildError(
                f"shard {shard}: {self.deaths[shard]} workers died while they labelled it, the last was {how}; if the "
                "system ran out of memory, use fewer --workers or a smaller --batch-size"
            )
        self.shards.appendleft(shard)


class WorkerTraceback(Exception):
    """A worker's traceback as text: the cause of the error that the driver raises."""


def failure(failed: Failed, worker: str, shards: Sequence[int] = ()) -> FerkdError:
    """Return the error to raise: a FerkdError as the worker raised it, any other as a BuildError that says where.

    Of two `shards`, one was being written while the other was labelled, and either may be the one that failed.
    """
    where = f"shard {' or '.join(map(str, shards))}: {worker}" if shards else worker
    kind = getattr(errors, failed.kind, None)
    # Errors come as texts, since one may not unpickle here. An ImageError is made of a reason and a detail, which its
    # text does not give back; and in a build it is a reject, not an error.
    if isinstance(kind, type) and issubclass(kind, FerkdError) and kind is not errors.ImageError:
        error: FerkdError = kind(failed.text)
    else:
        error = BuildError(f"{where} failed: {failed.kind}: {failed.text} (--debug shows where)")
    error.__cause__ = WorkerTraceback(f"in {where}\n{failed.trace}")
    return error


def silent(shard: int, limit_seconds: float, worker: str) -> TeacherError:
    """Return the error for a worker that does not report at all, so that the teacher is not known."""
    return TeacherError(
        f"shard {shard}: a teacher hangs, and {worker} with it, for longer than {limit_seconds:g} seconds; the worker "
        "was ended. Run the same command again, with a larger --teacher-timeout if the teacher is slow"
    )


def too_slow(teacher: str, shard: int | None, limit_seconds: float, worker: str) -> TeacherError:
    """Return the error for a worker that reports that it waits for a teacher."""
    return TeacherError(
        f"teacher {teacher}: no answer for a batch of shard {shard} within {limit_seconds:g} seconds, "
        f"{worker} was ended; run the same command again, with a larger --teacher-timeout if it is slow"
    )


@dataclass(kw_only=True, eq=False)
class Member(Generic[AnyWorker]):
    """A member of the pool: its present worker, which is replaced when it dies, and the shards that are with it."""

    number: int
    worker: AnyWorker
    shard: int | None = None
    """The shard that it labels."""
    writing: set[int] = field(default_factory=set)
    """Shards that are labelled, and not saved yet as far as is known."""
    ready: bool = False
    deaths_at_start: int = 0
    heard_at: float = 0.0
    """Time of the last message, by the pool's `listened_seconds`."""

    @property
    def held(self) -> list[int]:
        return [*sorted(self.writing), *([] if self.shard is None else [self.shard])]

    def __str__(self) -> str:
        return str(self.worker)


@dataclass(kw_only=True)
class _Unseen:
    """A finished shard whose record the driver does not see yet."""

    worker: int
    name: str
    deadline: float
    look_at: float = 0.0


class WorkerPool(Generic[AnyWorker]):
    """A context that labels shards with several workers, and ends them all when it is left."""

    def __init__(
        self,
        workers: Workers[AnyWorker],
        folder: BuildFolder,
        counter: ProgressCounter,
        stop: Stop,
        teacher_timeout: float | None = None,
    ) -> None:
        self.workers = workers
        self.folder = folder
        self.counter = counter
        self.stop = stop
        self.teacher_timeout = teacher_timeout
        self.todo = ShardQueue()
        self.members: list[Member[AnyWorker]] = []
        self.free: list[Member[AnyWorker]] = []
        """Members that have answered their last request."""
        self.held: set[int] = set()
        """Shards that members label or write: the union of their `held`, kept since there may be a thousand members."""
        self.unseen: dict[int, _Unseen] = {}
        self.listened_seconds = 0.0
        self.room = 0
        self.room_from = 0.0

    def __enter__(self) -> WorkerPool[AnyWorker]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # All are told first, so that they leave at the same time and not one after the other.
        for member in self.members:
            member.worker.leave()
        for member in self.members:
            member.worker.end(LEAVE_SECONDS if kind is None else 0)

    def label(self, shards: Sequence[int]) -> None:
        """Return when each of `shards` has its record. Raises what a worker raised, BuildError, BuildStoppedError."""
        self.todo.add(shards)
        while self.todo or self._in_work():
            if self.stop.expired or (self.stop.requested and not self._in_work()):
                raise self.stop.error()
            # Workers first, so that a new one loads its teachers while shards are given to the others.
            self._grow()
            self.free = [member for member in self.free if not self._give(member)]
            self._listen()
            self._look_for_records()
            self.counter.tick()

    def _in_work(self) -> int:
        """Return the number of shards that are begun and whose record is not seen yet."""
        return len(self.held) + len(self.unseen)

    def _grow(self) -> None:
        now = time.monotonic()
        # On Ray nodes come and go; to ask is a call to the cluster.
        if now - self.room_from > ROOM_SECONDS or not self.members:
            self.room, self.room_from = self.workers.room(), now
        # No more members than shards that are not done: others would load teachers for nothing.
        while len(self.members) < min(self.room, len(self.todo) + self._in_work()):
            number = len(self.members)
            # A member's number is its index: `with_messages` returns workers, which are found again by it.
            self.members.append(Member(number=number, worker=self.workers.start(number)))

    def _give(self, member: Member[AnyWorker]) -> bool:
        """Give a member something to do; return whether there was anything."""
        if self.todo and not self.stop.requested:
            member.shard, member.heard_at = self.todo.take(), self.listened_seconds
            self.held.add(member.shard)
            self.counter.shard_begun(member.shard, member.number)
            member.worker.label(member.shard)
        elif member.writing:
            # No shard is left for it: now it has to report those that it is still writing (see `WriteBehind`).
            member.worker.settle()
        else:
            return False
        return True

    def _listen(self) -> None:
        began = time.monotonic()
        ready = self.workers.with_messages([member.worker for member in self.members], POLL_SECONDS)
        # Not the clock's time: a driver that was suspended with its workers must not count that as silence.
        self.listened_seconds += min(time.monotonic() - began, 2 * POLL_SECONDS)
        for member in [self.members[worker.number] for worker in ready]:
            member.heard_at = self.listened_seconds
            self._hear(member)
        if self.teacher_timeout is not None:
            self._check_alive(self.teacher_timeout)

    def _hear(self, member: Member[AnyWorker]) -> None:
        try:
            message = member.worker.receive()
        except WorkerLostError as lost:
            self._replace_dead(member, lost)
            return
        match message:
            case Ready():
                member.deaths_at_start, member.ready = 0, True
                self.free.append(member)
                self.counter.worker_started(member.number, member.worker.location(message))
            case Labelled(crops, rejects):
                if member.shard is not None:
                    self.counter.batch(member.shard, crops, rejects, member.number)
            case Halved(teacher, crops):
                self.counter.halved(teacher, crops, member.number)
            case Computed():
                if member.shard is not None:
                    member.writing.add(member.shard)
                member.shard = None
                self.free.append(member)
                self.counter.worker_idle(member.number)
            case ShardSaved(shard):
                member.writing.discard(shard)
                # From here on the shard is in `unseen`, so that it counts as in work until its record is seen.
                self.held.discard(shard)
                self._expect_record(shard, member)
            case Settled():
                self.free.append(member)
            case Slow(teacher):
                raise too_slow(teacher, member.shard, self.teacher_timeout or 0, str(member))
            case Failed() if message.kind == DeviceFailedError.__name__:
                # Ended at once: its process can use the device no more, and what it still writes is labelled again.
                self._replace_dead(member, WorkerLostError(f"ended, since {message.text}"), wait_seconds=0)
            case Failed():
                raise failure(message, str(member), member.held)

    def _check_alive(self, limit_seconds: float) -> None:
        for member in self.members:
            silent_seconds = self.listened_seconds - member.heard_at
            if member.shard is not None and silent_seconds > limit_seconds + SILENT_SECONDS:
                raise silent(member.shard, limit_seconds, str(member))

    def _expect_record(self, shard: int, member: Member[AnyWorker]) -> None:
        deadline = time.monotonic() + VISIBLE_SECONDS
        self.unseen[shard] = _Unseen(worker=member.number, name=str(member), deadline=deadline)

    def _look_for_records(self) -> None:
        now, in_vain = time.monotonic(), False
        for shard, unseen in [(shard, unseen) for shard, unseen in self.unseen.items() if unseen.look_at <= now]:
            record = self.folder.files.record(shard)
            if record is not None:
                del self.unseen[shard]
                self.counter.shard_done(record, unseen.worker)
            elif now > unseen.deadline:
                raise BuildError(
                    f"shard {shard}: {unseen.name} finished it; its files are not in {self.folder.location}"
                )
            else:
                unseen.look_at, in_vain = now + POLL_SECONDS, True
        # Once for all of them, after the records: it may list whole folders.
        if in_vain:
            self.folder.files.look_again()

    def _replace_dead(
        self, member: Member[AnyWorker], lost: WorkerLostError, *, wait_seconds: float = LEAVE_SECONDS
    ) -> None:
        """Put the shards of a worker that died back, and start a new one. Raises BuildError where that is hopeless."""
        if self.stop.requested:  # a batch system that stops a job often signals all its processes
            raise self.stop.error()
        # The process must be gone before another worker writes the same files.
        member.worker.end(wait_seconds)
        held = member.held
        self.counter.worker_died(member.number, str(lost), held)
        self.held.difference_update(held)
        for shard in held:
            # It may have died after the record was saved, and before it could say so.
            if self.folder.files.record(shard) is not None:
                self._expect_record(shard, member)
            else:
                self.todo.give_back(shard, f"{member} {lost}")
        if not member.ready:
            member.deaths_at_start += 1
            if member.deaths_at_start >= DEATHS_AT_START:
                raise BuildError(
                    f"{member}: died {DEATHS_AT_START} times in a row before it was ready, the last time {lost}; "
                    f"{self.workers.when_none_gets_ready}"
                ) from lost
        # It may have died while it was free.
        self.free = [other for other in self.free if other is not member]
        member.shard, member.ready, member.writing = None, False, set()
        member.worker, member.heard_at = self.workers.start(member.number), self.listened_seconds
