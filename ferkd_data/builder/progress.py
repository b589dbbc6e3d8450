"""What a build tells whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


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


OnProgress = Callable[[Progress], None]


@dataclass(kw_only=True)
class ProgressCounter:
    """Adds up events to a `Progress`."""

    report: OnProgress
    crops_per_image: int
    shards_total: int
    images_total: int
    shards_done: int = 0
    images_before: int = 0
    """Done in earlier shards or runs."""
    rejects_before: int = 0
    crops_done: int = 0
    crops_in_shard: int = 0
    started: float = field(default_factory=time.monotonic)

    def shard_done(self, images: int, rejects: int) -> None:
        self.shards_done += 1
        self.images_before += images
        self.rejects_before += rejects
        self.crops_in_shard = 0

    def batch(self, shard: int, crops: int, rejects_in_shard: int) -> None:
        self.crops_done += crops
        self.crops_in_shard += crops
        rate = self.crops_done / max(time.monotonic() - self.started, 1e-9)
        done = self.images_before + self.crops_in_shard // self.crops_per_image + rejects_in_shard
        left = (self.images_total - done) * self.crops_per_image
        self.report(
            Progress(
                shard=shard,
                shards_done=self.shards_done,
                shards_total=self.shards_total,
                images_done=done,
                images_total=self.images_total,
                crops_done=self.crops_done,
                rejects=self.rejects_before + rejects_in_shard,
                crops_per_second=rate,
                seconds_left=left / rate if rate > 0 else None,
            )
        )
