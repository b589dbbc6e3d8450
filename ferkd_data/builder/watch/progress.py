"""Sum up the reports of one or many workers, and tell the watchers."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from ferkd_data.builder.shard_files import ShardRecord
from ferkd_data.builder.watch.events import (
    BatchHalved,
    ImageRejected,
    Progress,
    ShardDone,
    Watcher,
    WorkerDied,
    WorkerProgress,
    WorkerStarted,
)

RATE_SECONDS = 60.0
"""Length of the time over which a worker's rate is taken."""
MARK_SECONDS = 1.0
"""Seconds between two marks of a worker's rate, and between two sums over the workers."""
TICK_SECONDS = 5.0
"""Time without a batch after which progress is told all the same, so that workers that hang show."""
STRAGGLER_SHARE = 0.5
"""A straggler labels at less than this share of the median rate."""
STRAGGLER_SECONDS = 30.0
"""Time that a worker has to get going before it may count as a straggler."""


@dataclass(kw_only=True)
class _Worker:
    """Work of one worker so far, and its rate over the last minute of it."""

    started: float
    """Start of its work, moved later by all the time that it had none, which must not lower its rate."""
    shard: int = 0
    idle_since: float | None = None
    crops: int = 0
    marks: deque[tuple[float, int]] = field(default_factory=deque)
    """(time, crops until then) within the last minute, and the newest such pair before it."""

    def __post_init__(self) -> None:
        self.marks.append((self.started, 0))

    def add(self, crops: int, now: float) -> None:
        self.crops += crops
        if now - self.marks[-1][0] >= MARK_SECONDS:
            self.marks.append((now, self.crops))
        self._forget(now)

    def go_on(self, now: float) -> None:
        if self.idle_since is not None:
            pause, self.idle_since = now - self.idle_since, None
            self.started += pause
            # As if the pause had not been: the last minute is one of work.
            self.marks = deque((at + pause, crops) for at, crops in self.marks)

    def rate(self, now: float) -> float:
        self._forget(now)
        since, before = self.marks[0]
        return (self.crops - before) / max(now - since, 1e-9)

    def _forget(self, now: float) -> None:
        # One mark from before the minute stays: it says how many crops there were when the minute began.
        while len(self.marks) > 1 and self.marks[1][0] <= now - RATE_SECONDS:
            self.marks.popleft()


@dataclass(kw_only=True)
class _Shard:
    """Progress in one shard."""

    begun: float
    crops_per_image: int
    crops: int = 0
    """Crops labelled so far."""
    rejects: int = 0

    @property
    def images_done(self) -> int:
        return self.crops // self.crops_per_image + self.rejects

    @property
    def crops_passed(self) -> int:
        """Crops labelled, and crops of images that were rejected."""
        return self.crops + self.rejects * self.crops_per_image


class _InWork:
    """The shards in work, and their sums. These are kept up to date, since a thousand workers change them often."""

    def __init__(self) -> None:
        self.images_done = self.crops_passed = self.rejects = 0
        self._shards: dict[int, _Shard] = {}

    def begin(self, number: int, shard: _Shard) -> None:
        self.end(number)
        self._shards[number] = shard

    def get(self, number: int) -> _Shard | None:
        return self._shards.get(number)

    def add(self, number: int, crops: int, rejects: int) -> None:
        # Taken out and put back, since the sums are of rounded numbers: an image is done with its last crop.
        shard = self._shards[number]
        self._sum(shard, -1)
        shard.crops += crops
        # The number so far, not since the last report: a lost message costs nothing.
        shard.rejects = rejects
        self._sum(shard, 1)

    def end(self, number: int) -> _Shard | None:
        shard = self._shards.pop(number, None)
        if shard is not None:
            self._sum(shard, -1)
        return shard

    def _sum(self, shard: _Shard, sign: int) -> None:
        self.images_done += sign * shard.images_done
        self.crops_passed += sign * shard.crops_passed
        self.rejects += sign * shard.rejects


@dataclass(kw_only=True)
class ProgressCounter:
    """Takes the reports of an engine (a worker started, a batch was labelled, …) and makes events of them.

    Belongs to the driver's one thread.
    """

    watcher: Watcher
    crops_of: Callable[[int], int]
    """Crops per image that this build labels in a shard."""
    shards_total: int
    images_total: int
    crops_total: int
    num_teachers: int
    shards_done: int = 0
    images_before: int = 0
    """Images of finished shards, also of earlier runs."""
    crops_before: int = 0
    crops_found: int = 0
    """Crops labelled by earlier runs."""
    rejects_before: int = 0
    crops_done: int = 0
    crops_rejected: int = 0
    """Crops of rejected images, which this run does not label."""
    started: float = field(default_factory=time.monotonic)
    _in_work: _InWork = field(default_factory=_InWork)
    _workers: dict[int, _Worker] = field(default_factory=dict)
    _summary: tuple[tuple[WorkerProgress, ...], tuple[int, ...]] = ((), ())
    _summed_at: float = float("-inf")
    _told_at: float = field(default_factory=time.monotonic)
    _last_shard: int = 0

    def worker_started(self, worker: int, device: str = "") -> None:
        """Note a worker that has loaded its teachers. Its rate counts from now on, the build's from the first one's."""
        now = time.monotonic()
        # Loading teachers takes minutes, in which nothing is labelled: it would lower the rate, and raise the time
        # left.
        if not self._workers and not self.crops_done:
            self.started = now
        self._workers[worker] = _Worker(started=now, idle_since=now)
        self.watcher.see(WorkerStarted(worker=worker, device=device))

    def worker_idle(self, worker: int) -> None:
        """Note that a worker has nothing to do until it begins another shard."""
        if worker in self._workers:
            self._workers[worker].idle_since = time.monotonic()

    def worker_died(self, worker: int, how: str, shards: Sequence[int] = ()) -> None:
        """Note a death. The crops that the worker had labelled of `shards` have to be labelled again."""
        self._workers.pop(worker, None)
        for shard in shards:
            self._in_work.end(shard)
        self.watcher.see(WorkerDied(worker=worker, how=how, shards=tuple(shards)))

    def halved(self, teacher: str, crops: int, worker: int = 0) -> None:
        self.watcher.see(BatchHalved(worker=worker, teacher=teacher, crops=crops))

    def shard_found(self, record: ShardRecord) -> None:
        """Count a shard that an earlier run of this build has labelled."""
        self._count(record)
        self.crops_found = self.crops_before

    def shard_begun(self, shard: int, worker: int = 0) -> None:
        self._begin(shard)
        if worker in self._workers:
            self._workers[worker].go_on(time.monotonic())

    def shard_done(self, record: ShardRecord, worker: int = 0) -> None:
        now = time.monotonic()
        state = self._in_work.end(record.index)
        self._count(record)
        self.crops_rejected += len(record.rejects) * self.crops_of(record.index)
        for reject in record.rejects:
            self.watcher.see(ImageRejected(shard=record.index, **asdict(reject)))
        done = ShardDone(
            shard=record.index,
            worker=worker,
            seconds=now - state.begun if state is not None else 0.0,
            images=record.rows,
            crops=record.rows * self.crops_of(record.index),
            rejects=len(record.rejects),
        )
        self.watcher.see(done)
        self._tell(record.index, now)

    def batch(self, shard: int, crops: int, rejects_in_shard: int, worker: int = 0) -> None:
        now = time.monotonic()
        if self._in_work.get(shard) is None:
            self._begin(shard)
        self._in_work.add(shard, crops, rejects_in_shard)
        busy = self._workers.setdefault(worker, _Worker(started=self.started))
        busy.shard = shard
        busy.go_on(now)
        busy.add(crops, now)
        self.crops_done += crops
        self._tell(shard, now)

    def tick(self) -> None:
        """Tell the progress now and then while an engine waits for workers."""
        now = time.monotonic()
        if now - self._told_at >= TICK_SECONDS:
            self._tell(self._last_shard, now)

    def _begin(self, shard: int) -> None:
        self._in_work.begin(shard, _Shard(begun=time.monotonic(), crops_per_image=self.crops_of(shard)))

    def _count(self, record: ShardRecord) -> None:
        images = record.rows + len(record.rejects)
        self.shards_done += 1
        self.images_before += images
        self.crops_before += images * self.crops_of(record.index)
        self.rejects_before += len(record.rejects)

    def _tell(self, shard: int, now: float) -> None:
        self._told_at, self._last_shard = now, shard
        self.watcher.see(self._progress(shard, now))

    def _progress(self, shard: int, now: float) -> Progress:
        rate = self.crops_done / max(now - self.started, 1e-9)
        # Crops of rejected images are passed, though nobody labels them.
        left = self.crops_total - self.crops_before - self._in_work.crops_passed
        workers, stragglers = self._sum_up(now)
        return Progress(
            shard=shard,
            shards_done=self.shards_done,
            shards_total=self.shards_total,
            images_done=self.images_before + self._in_work.images_done,
            images_total=self.images_total,
            crops_done=self.crops_done,
            rejects=self.rejects_before + self._in_work.rejects,
            crops_per_second=rate,
            seconds_left=left / rate if rate > 0 else None,
            workers=workers,
            stragglers=stragglers,
            forwards_done=self.crops_done * self.num_teachers,
            forwards_total=(self.crops_total - self.crops_found - self.crops_rejected) * self.num_teachers,
        )

    def _sum_up(self, now: float) -> tuple[tuple[WorkerProgress, ...], tuple[int, ...]]:
        """Return the workers' rates and the stragglers, at most once a second: a thousand workers send many batches."""
        if now - self._summed_at >= MARK_SECONDS:
            self._summed_at = now
            rates = {number: state.rate(now) for number, state in sorted(self._workers.items())}
            # Workers that have nothing to do are no stragglers, and would lower the median.
            busy = {number: rate for number, rate in rates.items() if self._workers[number].idle_since is None}
            slow = STRAGGLER_SHARE * statistics.median(busy.values()) if busy else 0
            late = {n for n in busy if now - self._workers[n].started >= STRAGGLER_SECONDS}
            self._summary = (
                tuple(
                    WorkerProgress(worker=number, shard=self._workers[number].shard, crops_per_second=rate)
                    for number, rate in rates.items()
                ),
                tuple(number for number, rate in busy.items() if (rate < slow or not rate) and number in late),
            )
        return self._summary
