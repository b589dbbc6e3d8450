"""What a build tells whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class WorkerProgress:
    worker: int
    shard: int
    """The image shard that it last spoke of."""
    crops_per_second: float
    """Over this run."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    shard: int
    """The image shard in work."""
    shards_done: int
    shards_total: int
    images_done: int
    """Labelled or rejected, also by earlier runs of this build."""
    images_total: int
    crops_done: int
    """By this run."""
    rejects: int
    crops_per_second: float
    """Over this run."""
    seconds_left: float | None
    workers: tuple[WorkerProgress, ...] = ()
    """Every worker that has labelled anything, in the order of their numbers."""


OnProgress = Callable[[Progress], None]


@dataclass(kw_only=True)
class _Worker:
    started: float
    shard: int = 0
    crops: int = 0


@dataclass(kw_only=True)
class _Shard:
    crops: int = 0
    rejects: int = 0


@dataclass(kw_only=True)
class ProgressCounter:
    """Adds up the events of one or many workers to a `Progress`."""

    report: OnProgress
    crops_per_image: int
    shards_total: int
    images_total: int
    shards_done: int = 0
    images_before: int = 0
    """Done in earlier shards or runs."""
    rejects_before: int = 0
    crops_done: int = 0
    started: float = field(default_factory=time.monotonic)
    _in_work: dict[int, _Shard] = field(default_factory=dict)
    _workers: dict[int, _Worker] = field(default_factory=dict)

    def worker_started(self, worker: int) -> None:
        """Its rate counts from here on, not from the build's start."""
        self._workers[worker] = _Worker(started=time.monotonic())

    def shard_done(self, shard: int, images: int, rejects: int) -> None:
        self._in_work.pop(shard, None)
        self.shards_done += 1
        self.images_before += images
        self.rejects_before += rejects

    def shard_lost(self, shard: int) -> None:
        """Its worker died: what it had labelled of the shard has to be labelled again."""
        self._in_work.pop(shard, None)

    def batch(self, shard: int, crops: int, rejects_in_shard: int, worker: int = 0) -> None:
        state = self._in_work.setdefault(shard, _Shard())
        state.crops += crops
        state.rejects = rejects_in_shard
        if worker not in self._workers:
            self._workers[worker] = _Worker(started=self.started)
        self._workers[worker].shard = shard
        self._workers[worker].crops += crops
        self.crops_done += crops
        self.report(self._progress(shard))

    def _progress(self, shard: int) -> Progress:
        now = time.monotonic()
        rate = self.crops_done / max(now - self.started, 1e-9)
        rejects = sum(state.rejects for state in self._in_work.values())
        labelled = sum(state.crops // self.crops_per_image for state in self._in_work.values())
        done = self.images_before + labelled + rejects
        left = (self.images_total - done) * self.crops_per_image
        return Progress(
            shard=shard,
            shards_done=self.shards_done,
            shards_total=self.shards_total,
            images_done=done,
            images_total=self.images_total,
            crops_done=self.crops_done,
            rejects=self.rejects_before + rejects,
            crops_per_second=rate,
            seconds_left=left / rate if rate > 0 else None,
            workers=tuple(
                WorkerProgress(
                    worker=number, shard=state.shard, crops_per_second=state.crops / max(now - state.started, 1e-9)
                )
                for number, state in sorted(self._workers.items())
            ),
        )
