"""Settings of a build: what is written (`BuildSettings`) and how it is computed (`Resources`)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from ferkd_data.buckets import QuantileThresholds, Thresholds
from ferkd_data.crops import CropDistribution
from ferkd_data.errors import UsageError
from ferkd_data.images import DEFAULT_MAX_PIXELS
from ferkd_data.manifest import Layout

DEFAULT_IMAGES_PER_SHARD: dict[Layout, int] = {"parquet": 4096, "webdataset": 1024}


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Everything that decides what a build writes, besides the images and the teachers."""

    crops: int = 200
    """Crops per image, N."""
    crops_per_block: int = 50
    top_k: int = 5
    layout: Layout = "parquet"
    images_per_shard: int | None = None
    """None: 4096 for parquet, 1024 for webdataset."""
    seed: int = 0
    distribution: CropDistribution = field(default_factory=CropDistribution)
    ensemble: Literal["mean", "logits", "geometric"] = "mean"
    thresholds: Thresholds | QuantileThresholds = field(default_factory=Thresholds)
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Images with more pixels are rejected before they are decoded."""

    def __post_init__(self) -> None:
        if not 1 <= self.crops <= 65535:
            raise UsageError(f"crops must be 1..65535, got {self.crops}")
        for name in ("crops_per_block", "top_k", "max_pixels"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.images_per_shard is not None and self.images_per_shard < 1:
            raise UsageError(f"images_per_shard must be at least 1, got {self.images_per_shard}")
        if self.layout not in DEFAULT_IMAGES_PER_SHARD:
            raise UsageError(f"layout must be parquet or webdataset, got {self.layout!r}")
        if self.ensemble not in ("mean", "logits", "geometric"):
            raise UsageError(f"ensemble must be mean, logits or geometric, got {self.ensemble!r}")

    @property
    def shard_images(self) -> int:
        return self.images_per_shard or DEFAULT_IMAGES_PER_SHARD[self.layout]

    @property
    def block_starts(self) -> range:
        """First crop of each block file."""
        return range(0, self.crops, self.crops_per_block if self.layout == "parquet" else self.crops)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a build may use; none of it changes what is written."""

    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    batch_size: int | None = None
    """Crops per forward pass; None: 256 on cuda, 32 on cpu."""
    workers: int | None = None
    """Threads that decode and cut; None: half the cores, 1 to 8."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")

    def resolved_device(self) -> str:
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"device {self.device}: PyTorch finds no CUDA here; use --device cpu")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        return self.device

    def resolved_batch_size(self) -> int:
        return self.batch_size or (32 if self.resolved_device() == "cpu" else 256)

    def resolved_workers(self) -> int:
        return self.workers or min(8, max(1, (os.cpu_count() or 2) // 2))
