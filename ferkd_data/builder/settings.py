"""Settings of a build: what is written (`BuildSettings`) and what computes it (`Resources`, `WorkerResources`).

The TypedDicts at the end type the keyword arguments of `build`, `build_part` and `dry_run`, so that type checkers find
a misspelt one. A test compares them with the fields of `BuildSettings` and `Resources`.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from ferkd_data.augment.distribution import Augmentation, parse_augmentations
from ferkd_data.crop_kinds import CropKind, block_of_kinds, draw_crops_of_kinds, make_crop_kinds
from ferkd_data.crops import CropDistribution, Crops, draw_crops
from ferkd_data.errors import UsageError
from ferkd_data.format.manifest import DEFAULT_CROPS_PER_BLOCK, DEFAULT_IMAGES_PER_SHARD, Layout, Manifest, check_limits
from ferkd_data.images import DEFAULT_MAX_PIXELS
from ferkd_data.labels.buckets import QuantileThresholds, Thresholds
from ferkd_data.teachers import TeacherSpec

DEFAULT_CROPS = 200
# On a CPU larger batches outgrow the caches of a core, smaller ones cost more than they save; a GPU needs many crops to
# be busy. Both are fixed, since labels depend on the batch in their last bits (docs/decisions.md).
CPU_BATCH = 8
CUDA_BATCH = 256
MOST_THREADS = 8
"""Decoding threads of a worker unless told otherwise: more of them wait for the teachers."""


@functools.cache
def _parsed(augment: tuple[str, ...]) -> tuple[Augmentation, ...]:
    """Parse augmentations once: each image asks for them."""
    return parse_augmentations(augment)


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """All that decides what a build writes, apart from the images and the teachers.

    Raises UsageError for a value out of range.

    >>> list(BuildSettings(crops=120).block_starts)  # the first crop of each block file
    [0, 50, 100]
    """

    crops: int = None  # type: ignore[assignment]  # a number from __post_init__ on
    """Crops per image, N: by default 200 or, with `crop_kinds`, the sum of theirs."""
    crops_per_block: int = DEFAULT_CROPS_PER_BLOCK
    """Crops in one block file; with `crop_kinds`, the largest number up to this with which no block holds two kinds."""
    top_k: int = 5
    layout: Layout = "parquet"
    images_per_shard: int | None = None
    """None: 4096 for parquet, 1024 for webdataset."""
    seed: int = 0
    distribution: CropDistribution = field(default_factory=CropDistribution)
    crop_kinds: Sequence[str | CropKind] = ()
    """Kinds of crops for multi-crop students, such as "local:scale=0.05..0.25,size=96,n=80"; each is a range of crop
    numbers, in this order. Options that a kind does not give are those of `distribution`."""
    augment: Sequence[str] = ()
    """Augmentations that are drawn and recorded with each crop, in order, such as "randaugment:n=2,m=9"."""
    ensemble: Literal["mean", "logits", "geometric"] = "mean"
    thresholds: Thresholds | QuantileThresholds = field(default_factory=Thresholds)
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Images with more pixels are rejected before they are decoded."""

    def __post_init__(self) -> None:
        self._settle_kinds()
        if not 1 <= self.crops <= 65535:
            raise UsageError(f"crops must be 1..65535, got {self.crops}")
        for name in ("crops_per_block", "top_k", "max_pixels"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_limits(crops_per_block=self.crops_per_block, top_k=self.top_k)
        if self.images_per_shard is not None and self.images_per_shard < 1:
            raise UsageError(f"images_per_shard must be at least 1, got {self.images_per_shard}")
        if self.layout not in DEFAULT_IMAGES_PER_SHARD:
            raise UsageError(f"layout must be parquet or webdataset, got {self.layout!r}")
        if self.ensemble not in ("mean", "logits", "geometric"):
            raise UsageError(f"ensemble must be mean, logits or geometric, got {self.ensemble!r}")

        # A string is a sequence of strings, too.
        if isinstance(self.augment, str):
            raise UsageError(f"augment is a list of augmentations, as in augment=[{self.augment!r}]")
        # As parsed, so that two ways to write the same are the same settings.
        object.__setattr__(self, "augment", tuple(map(str, parse_augmentations(self.augment))))

    def _settle_kinds(self) -> None:
        """Parse the crop kinds; the number of crops and the block size follow from them."""
        kinds = make_crop_kinds(self.crop_kinds, distribution=self.distribution)
        total = sum(kind.crops for kind in kinds)
        if kinds and self.crops not in (None, total):
            raise UsageError(
                f"crops is {self.crops}, but the crop kinds have {total} crops together; leave out crops, since each "
                "kind says its own number (n=)"
            )
        object.__setattr__(self, "crop_kinds", kinds)
        object.__setattr__(self, "crops", (total or DEFAULT_CROPS) if self.crops is None else self.crops)
        if kinds and self.layout == "parquet" and self.crops_per_block >= 1:
            object.__setattr__(self, "crops_per_block", block_of_kinds(kinds, self.crops_per_block))

    @property
    def kinds(self) -> tuple[CropKind, ...]:
        """The crop kinds as parsed; empty where all crops are drawn from `distribution`."""
        return self.crop_kinds  # type: ignore[return-value]  # parsed in __post_init__

    def draw(self, key: str, height: int, width: int, *, first: int = 0) -> Crops:
        """Draw the boxes and flips of crops `first` .. N - 1 of an image. Raises ImageError as `draw_crops` does."""
        wanted = {"seed": self.seed, "first": first, "count": self.crops - first}
        if self.kinds:
            return draw_crops_of_kinds(key, height, width, kinds=self.kinds, **wanted)
        return draw_crops(key, height, width, distribution=self.distribution, **wanted)

    @property
    def augmentations(self) -> tuple[Augmentation, ...]:
        return _parsed(tuple(self.augment))

    @property
    def shard_images(self) -> int:
        return self.images_per_shard or DEFAULT_IMAGES_PER_SHARD[self.layout]

    @property
    def block_starts(self) -> range:
        """First crop of each block file."""
        return range(0, self.crops, self.crops_per_block if self.layout == "parquet" else self.crops)


def stored_settings(manifest: Manifest) -> dict[str, Any]:
    """Return the settings that decide on the crops and labels of images, as arguments of `BuildSettings`.

    Quantile thresholds are returned as the numbers that were found. The number of crops, their kinds and the block size
    are left to the caller, since an extension may raise them.
    """
    return {
        "top_k": manifest.top_k,
        "layout": manifest.layout,
        "seed": manifest.seed,
        "distribution": manifest.crop_distribution.settings(),
        "augment": manifest.augmentations or (),
        "ensemble": manifest.ensemble,
        "thresholds": manifest.thresholds.absolute(),
    }


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Processors, memory and time that a build may use, as the user asks for them.

    `device`, `batch_size` and `compile` change labels a little: precision "auto" is bf16 on a GPU and fp32 on a CPU,
    and the last bits of a network's answers depend on all three.

    Raises UsageError for a value that no machine could have.

    >>> Resources(device="cpu", workers=2).resolved_devices()
    ['cpu', 'cpu']
    """

    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda, cuda:N, several as cuda:0,1, or all GPUs as all."""
    workers: int | None = None
    """Worker processes on each device; None: one. A build with a single worker runs it in the calling process.

    With engine="ray", workers of the whole cluster; None: as many as it has room for."""
    threads: int | None = None
    """Threads of each worker that decode images and cut crops; None: half of the worker's cores, 1 to 8."""
    batch_size: int | None = None
    """Crops per forward pass; None: 256 on cuda, 8 on cpu, where a larger batch outgrows the caches of a core."""

    compile: bool = False
    """Run teachers that are PyTorch modules through torch.compile, which takes minutes at the start of each worker."""

    teacher_timeout: float | None = None
    """Seconds that a teacher may take for a batch before the build stops; None: no limit. Needs a worker process."""

    engine: Literal["local", "ray"] = "local"
    """local: this process, or worker processes on this machine. ray: actors on a Ray cluster, where `device` is auto,
    cpu or cuda."""
    ray_address: str | None = None
    """HOST:PORT of a cluster, or auto for the one that runs here; None: $RAY_ADDRESS, else one for this build alone."""
    gpus_per_teacher: float = 1.0
    """Share of a GPU that each worker on a Ray cluster gets: with 0.5, two workers share one."""

    processes: InitVar[int | None] = None
    """Deprecated name of `workers`."""

    def __post_init__(self, processes: int | None) -> None:
        if processes is not None:
            object.__setattr__(self, "workers", renamed_workers(self.workers, processes))
        if self.engine not in ("local", "ray"):
            raise UsageError(f"engine must be local or ray, got {self.engine!r}")
        if self.ray_address is not None and self.engine != "ray":
            raise UsageError("a Ray address (--ray-address) needs --engine ray")
        if self.gpus_per_teacher != 1 and self.engine != "ray":
            raise UsageError(
                "--gpus-per-teacher needs --engine ray; without it, --workers N runs N workers on each device"
            )
        if self.gpus_per_teacher != 1 and self.device == "cpu":
            raise UsageError(
                "--gpus-per-teacher has no effect with --device cpu; leave it out, or use --device cuda or auto"
            )
        if not 0 < self.gpus_per_teacher <= 1:
            raise UsageError(f"gpus_per_teacher must be above 0 and at most 1, got {self.gpus_per_teacher:g}")
        if self.teacher_timeout is not None and self.teacher_timeout <= 0:
            raise UsageError(f"teacher_timeout must be above 0 seconds, got {self.teacher_timeout}")
        for name in ("workers", "threads", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")

    def resolved_devices(self) -> list[str]:
        """Return the device of each worker on this machine, one on each before the second on any.

        A build of few shards starts no more workers than these, and should use all devices. Raises UsageError for a
        device that is not here.
        """
        import torch

        if self.device == "auto":
            devices = ["cuda" if torch.cuda.is_available() else "cpu"]
        elif self.device == "all":
            devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        else:
            devices = _parse_devices(self.device)
        on_cuda = [device for device in devices if device != "cpu"]
        # `all` names no device where there is no GPU.
        if (on_cuda or not devices) and not torch.cuda.is_available():
            raise UsageError(f"device {self.device}: PyTorch finds no CUDA device here; use --device cpu")
        missing = [device for device in on_cuda if int(device.partition(":")[2] or 0) >= torch.cuda.device_count()]
        if missing:
            raise UsageError(f"device {missing[0]}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
        return [device for _ in range(self.workers or 1) for device in devices]

    def resolved_device(self) -> str:
        """Return the device of the first worker. Raises UsageError for a device that is not here."""
        return self.resolved_devices()[0]

    def worker_resources(self, device: str, worker_cores: int) -> WorkerResources:
        """Return what one worker gets on `device`, where `worker_cores` cores are its share of the machine."""
        return WorkerResources(
            batch_size=self.batch_size or (CPU_BATCH if device == "cpu" else CUDA_BATCH),
            # Half, since PyTorch computes on the cores too.
            threads=self.threads or max(1, min(MOST_THREADS, worker_cores // 2)),
            compute_threads=max(1, worker_cores),
            compile=self.compile,
            teacher_timeout=self.teacher_timeout,
        )

    def local_worker(self) -> WorkerResources:
        """Return what each worker of this machine gets. Raises UsageError for a device that is not here."""
        devices = self.resolved_devices()
        return self.worker_resources(devices[0], cores() // len(devices))


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """Resources of each worker of a build, as numbers. Made of `Resources` once, then handed on as a whole."""

    batch_size: int
    """Crops per forward pass."""
    threads: int
    """Threads that decode images and cut crops."""
    compute_threads: int
    """Threads that PyTorch computes with."""
    compile: bool = False
    """Compile the teachers."""
    teacher_timeout: float | None = None
    """Seconds that a worker may wait for a teacher before the driver ends it; None: no limit."""


def renamed_workers(workers: int | None, processes: int | None) -> int | None:
    """Return the number of workers where the deprecated `processes` was given, and warn.

    Raises UsageError where both names are given.
    """
    if workers is not None:
        raise UsageError("processes is the old name of workers: give workers alone")
    warnings.warn("processes is deprecated, use workers", DeprecationWarning, stacklevel=4)
    return processes


def cores() -> int:
    """Return the number of cores that this process may use: in a container or batch job, often not all there are."""
    # macOS has no affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parse_devices(text: str) -> list[str]:
    """Parse `cpu`, `cuda`, `cuda:1`, `cuda:0,cuda:1` or `cuda:0,1` into one name for each device."""
    devices: list[str] = []
    # By what they mean: cuda is GPU 0, and so is cuda:00.
    meant: list[int | None] = []
    for piece in text.split(","):
        device = f"cuda:{piece}" if piece.isdecimal() and devices and devices[0].startswith("cuda:") else piece
        kind, colon, number = device.partition(":")
        if device not in ("cpu", "cuda") and not (kind == "cuda" and colon and number.isdecimal()):
            raise UsageError(f"device must be auto, cpu, cuda, cuda:N, cuda:N,M or all, got {text!r}")
        means = None if device == "cpu" else int(number or 0)
        if means in meant or (meant and None in (means, meant[0])):
            raise UsageError(
                f"device {text!r}: names a device twice, or cpu beside others; --workers N runs N workers on each"
            )
        devices.append(device)
        meant.append(means)
    return devices


class SettingsKeywords(TypedDict, total=False):
    """The fields of `BuildSettings` and of `Resources`, as keyword arguments."""

    crops: int
    crops_per_block: int
    top_k: int
    layout: Layout
    images_per_shard: int | None
    seed: int
    distribution: CropDistribution
    crop_kinds: Sequence[str | CropKind]
    augment: Sequence[str]
    ensemble: Literal["mean", "logits", "geometric"]
    thresholds: Thresholds | QuantileThresholds
    max_pixels: int

    device: str
    workers: int | None
    threads: int | None
    batch_size: int | None
    compile: bool
    teacher_timeout: float | None
    engine: Literal["local", "ray"]
    ray_address: str | None
    gpus_per_teacher: float


class BuildKeywords(SettingsKeywords, total=False):
    """Keyword arguments that `build`, `build_part` and `make_request` have in common."""

    teachers: Sequence[str | TeacherSpec]
    settings: BuildSettings | None
    resources: Resources | None
    classes: str | Path | None
    precision: str
    on_error: Literal["reject", "fail"]
    extend: bool


class DryRunKeywords(SettingsKeywords, total=False):
    """Keyword arguments of `build` that `dry_run` passes on."""

    settings: BuildSettings | None
    resources: Resources | None
    on_error: Literal["reject", "fail"]
