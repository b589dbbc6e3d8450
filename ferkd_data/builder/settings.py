"""Settings of a build: what is written (`BuildSettings`) and how it is computed (`Resources`).

Types of the keyword arguments that `build`, `build_part` and `dry_run` pass on: type checkers find a misspelt one.

A test compares the names and types with the fields of `BuildSettings` and `Resources`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from ferkd_data.augment.distribution import Augmentation, parse_augmentations
from ferkd_data.crops import CropDistribution
from ferkd_data.errors import UsageError
from ferkd_data.format.manifest import Layout
from ferkd_data.images import DEFAULT_MAX_PIXELS
from ferkd_data.labels.buckets import QuantileThresholds, Thresholds
from ferkd_data.teachers import TeacherSpec

DEFAULT_IMAGES_PER_SHARD: dict[Layout, int] = {"parquet": 4096, "webdataset": 1024}
CPU_BATCH = 8
CUDA_BATCH = 256


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
    augment: Sequence[str] = ()
    """Augmentations that are drawn and recorded with each crop, in order, such as "randaugment:n=2,m=9"."""
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

        if isinstance(self.augment, str):
            raise UsageError(f"augment is a list of augmentations, as in augment=[{self.augment!r}]")
        # As parsed, so that two ways to write the same are the same settings.
        object.__setattr__(self, "augment", tuple(map(str, parse_augmentations(self.augment))))

    @property
    def augmentations(self) -> tuple[Augmentation, ...]:
        return parse_augmentations(self.augment)

    @property
    def shard_images(self) -> int:
        return self.images_per_shard or DEFAULT_IMAGES_PER_SHARD[self.layout]

    @property
    def block_starts(self) -> range:
        """First crop of each block file."""
        return range(0, self.crops, self.crops_per_block if self.layout == "parquet" else self.crops)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Processors, memory and time that a build may use; none of it changes what is written."""

    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda, cuda:N, several as cuda:0,1, or all GPUs as all."""
    processes: int | None = None
    """Worker processes on each device; None: one. A build with one worker in all needs no process of its own."""
    batch_size: int | None = None
    """Crops per forward pass; None: 256 on cuda, 8 on cpu, where a larger batch outgrows the caches of a core."""
    workers: int | None = None
    """Threads that decode and cut, all processes together; None: half the cores, 1 to 8 for each process."""

    compile: bool = False
    """Run teachers that are PyTorch modules through torch.compile; takes minutes at the start of each worker."""

    teacher_timeout: float | None = None
    """Seconds that a teacher may take for a batch before the build stops; None: any time. Takes a worker process."""

    engine: Literal["local", "ray"] = "local"
    """On a Ray cluster, `processes` are those of the whole cluster, None: as many as it has room for; `workers` are the
    threads of each; `device` is auto, cpu or cuda."""
    ray_address: str | None = None
    """HOST:PORT of a cluster, or auto for the one that runs here; None: $RAY_ADDRESS, else one for this build alone."""
    gpus_per_teacher: float = 1.0
    """Share of a GPU that each worker on a Ray cluster gets: with 0.5, two workers share one."""

    def __post_init__(self) -> None:
        if self.engine not in ("local", "ray"):
            raise UsageError(f"engine must be local or ray, got {self.engine!r}")
        if self.ray_address is not None and self.engine != "ray":
            raise UsageError("a Ray address is of use with --engine ray only")
        if self.gpus_per_teacher != 1 and self.engine != "ray":
            raise UsageError("--gpus-per-teacher is of use with --engine ray only; --processes N runs N on each device")
        if not 0 < self.gpus_per_teacher <= 1:
            raise UsageError(f"gpus_per_teacher must be above 0 and at most 1, got {self.gpus_per_teacher:g}")
        if self.teacher_timeout is not None and self.teacher_timeout <= 0:
            raise UsageError(f"teacher_timeout must be above 0 seconds, got {self.teacher_timeout}")
        for name in ("processes", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")

    def resolved_devices(self) -> list[str]:
        """The device of each worker. Raises UsageError for a device that is not here."""
        import torch

        if self.device == "auto":
            devices = ["cuda" if torch.cuda.is_available() else "cpu"]
        elif self.device == "all":
            devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        else:
            devices = _parse_devices(self.device)
        on_cuda = [device for device in devices if device != "cpu"]
        if (on_cuda or not devices) and not torch.cuda.is_available():
            raise UsageError(f"device {self.device}: PyTorch finds no CUDA here; use --device cpu")
        missing = [device for device in on_cuda if int(device.partition(":")[2] or 0) >= torch.cuda.device_count()]
        if missing:
            raise UsageError(f"device {missing[0]}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
        return [device for device in devices for _ in range(self.processes or 1)]

    def resolved_device(self) -> str:
        return self.resolved_devices()[0]

    def resolved_batch_size(self) -> int:
        return self.batch_size or default_batch_size(self.resolved_device())

    def resolved_workers(self) -> int:
        """Threads that decode and cut in each process."""
        processes = len(self.resolved_devices())
        return max(1, self.workers // processes if self.workers else min(8, cores() // processes // 2))

    def resolved_threads(self) -> int:
        """Threads that one process computes with."""
        return max(1, cores() // len(self.resolved_devices()))


def default_batch_size(device: str) -> int:
    return CPU_BATCH if device == "cpu" else CUDA_BATCH


def cores() -> int:
    """Number of cores for this process; in a container or a batch job there can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parse_devices(text: str) -> list[str]:
    """`cpu`, `cuda`, `cuda:1`, `cuda:0,cuda:1` or `cuda:0,1`."""
    devices: list[str] = []
    for piece in text.split(","):
        device = f"cuda:{piece}" if piece.isdecimal() and devices and devices[0].startswith("cuda:") else piece
        kind, colon, number = device.partition(":")
        if device not in ("cpu", "cuda") and not (kind == "cuda" and colon and number.isdecimal()):
            raise UsageError(f"device must be auto, cpu, cuda, cuda:N, cuda:N,M or all, got {text!r}")
        if device in devices or (devices and "cpu" in (device, devices[0])):
            raise UsageError(f"device {text!r}: names one twice, or cpu beside others; --processes N runs N on each")
        devices.append(device)
    return devices


class SettingsKeywords(TypedDict, total=False):
    """Fields of `BuildSettings` and of `Resources`."""

    crops: int
    crops_per_block: int
    top_k: int
    layout: Layout
    images_per_shard: int | None
    seed: int
    distribution: CropDistribution
    augment: Sequence[str]
    ensemble: Literal["mean", "logits", "geometric"]
    thresholds: Thresholds | QuantileThresholds
    max_pixels: int

    device: str
    processes: int | None
    batch_size: int | None
    workers: int | None
    compile: bool
    teacher_timeout: float | None
    engine: Literal["local", "ray"]
    ray_address: str | None
    gpus_per_teacher: float


class BuildKeywords(SettingsKeywords, total=False):
    """Arguments of `build` that `build_part` passes on."""

    teachers: Sequence[str | TeacherSpec]
    settings: BuildSettings | None
    resources: Resources | None
    classes: str | Path | None
    precision: str
    on_error: Literal["reject", "fail"]
    extend: bool


class DryRunKeywords(SettingsKeywords, total=False):
    """Arguments of `build` that `dry_run` passes on."""

    settings: BuildSettings | None
    resources: Resources | None
    on_error: Literal["reject", "fail"]
