"""`LoaderSettings`: everything that decides what a loader gives, checked when it is made.

`CropLoader` and `CropDataset` take the same values as flat keyword arguments and bring them here; the parts of the
loader read them from here. To add a setting, add a field with its check, and a parameter of `CropLoader`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

import torch

from ferkd_data.calibration import CalibrationSetting, calibration_at
from ferkd_data.crop_kinds import MAX_SIZE
from ferkd_data.errors import UsageError
from ferkd_data.loader.kinds import KindOfBatch
from ferkd_data.loader.order import OrderKind, check_order
from ferkd_data.loader.ranks import check_ranks
from ferkd_data.loader.transform import Transform
from ferkd_data.replay import INTERPOLATIONS, Interpolation
from ferkd_data.selfmix import SelfMix

Verify = Literal["first_epoch", "always", "never"]
OnError = Literal["raise", "skip"]
ImagesMissing = Literal["raise", "drop"]
EpochKind = Literal["images", "crops"]
TargetsKind = Literal["soft", "dense"]
DecodeScale = Literal["exact", "auto"]
CHOICES = {
    "verify_images": Verify,
    "on_error": OnError,
    "images_missing": ImagesMissing,
    "epoch": EpochKind,
    "targets": TargetsKind,
    "decode_scale": DecodeScale,
}
OfEpoch: TypeAlias = Callable[[int], int]
OF_EPOCH = ("size", "crops_per_image")
"""The numbers that may be functions of the epoch."""
AT_LEAST = {
    "batch_size": 1,
    "crops_per_image": 1,
    "shards_together": 1,
    "num_workers": 0,
    "prefetch_factor": 1,
}
"""The smallest value of each setting that counts something."""
WHOLE_NUMBERS = (*AT_LEAST, "size", "seed")
SWITCHES = ("drop_last", "pin_memory", "keys", "log_stats")


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """Settings of a loader; see `CropLoader` for what each does. Raises UsageError for values that cannot be right.

    Whole numbers are kept as plain `int`, whatever integer type they came in, so that a saved state is plain JSON.
    """

    batch_size: int
    """Crops per batch and rank, B."""
    crops_per_image: int | OfEpoch = 4
    """M, or a function of the epoch that gives it."""
    size: int | OfEpoch = 224
    """Side of a crop in pixels, S, or a function of the epoch that gives it."""
    kinds: tuple[KindOfBatch, ...] = ()
    """The crop kinds of a batch; batch_size, crops_per_image and size are then those of the first one."""
    epoch: EpochKind = "images"
    """An epoch is a pass over the images, or as many crops as there are images."""
    interpolation: Interpolation = "bilinear"
    calibration: CalibrationSetting = "ferkd"
    selfmix: SelfMix | None = None
    spread: bool | int = False
    """Batches of a window: True for 2 * M, False for 1. See `window_batches`."""
    order: OrderKind = "global"
    shards_together: int = 8
    drop_last: bool = True
    seed: int = 0
    rank: int | None = None
    world_size: int | None = None
    """None: as torch.distributed has them when an iteration begins."""
    num_workers: int = 0
    prefetch_factor: int = 2
    """Windows that each worker makes ahead."""
    pin_memory: bool = False
    decode_device: str | torch.device | None = None
    decode_scale: DecodeScale = "exact"
    """Whether JPEGs may be decoded at a fraction of their size where their crops are much larger than `size`."""
    verify_images: Verify = "first_epoch"
    on_error: OnError = "raise"
    images_missing: ImagesMissing = "raise"
    """What to do with labelled images that the source lacks."""
    keys: bool = False
    """Whether targets have the key of each crop's image."""
    transform: Transform | None = None
    """The user's own augmentation of each crop."""
    targets: TargetsKind = "soft"
    """Whether a batch has SoftTargets or plain tensors (B, C)."""
    log_stats: bool = False
    """Whether the end of each epoch logs a line of where its time went."""

    def __post_init__(self) -> None:
        for name in WHOLE_NUMBERS:
            # Integers of NumPy become plain ones. bool is refused, though Python counts it as one: True is no size.
            if not (name in OF_EPOCH and callable(getattr(self, name))):
                object.__setattr__(self, name, _whole_number(name, getattr(self, name)))
        # None stays: it stands for what torch.distributed says when an iteration begins.
        for name in ("rank", "world_size"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _whole_number(name, getattr(self, name)))
        # True equals 1 in Python, but here True means 2 * M batches and 1 means one.
        if not isinstance(self.spread, bool):
            object.__setattr__(self, "spread", _whole_number("spread", self.spread))
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, least in AT_LEAST.items():
            if not callable(getattr(self, name)) and getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        self._check_choices()
        self._check_kinds()
        # Functions of the epoch are tried for epoch 0, so that one that is wrong fails when the loader is made.
        self.size_at(0)
        self.crops_at(0)
        calibration_at(self.calibration, 0)

    def of_kind(self, kind: KindOfBatch) -> LoaderSettings:
        """Return the settings with which the crops of one of the kinds are made."""
        images = self.batch_size // self.kinds[0].crops_per_image
        own = {"crops_per_image": kind.crops_per_image, "size": kind.size, "batch_size": images * kind.crops_per_image}
        return replace(self, kinds=(), **own)  # type: ignore[arg-type]

    def size_at(self, epoch: int) -> int:
        """Return S of an epoch. Raises UsageError for a size out of range."""
        size = _of_epoch("size", self.size, epoch)
        if not 1 <= size <= MAX_SIZE:
            raise UsageError(f"size must be 1..{MAX_SIZE}, got {size}{_in_epoch(self.size, epoch)}")
        return size

    def crops_at(self, epoch: int) -> int:
        """Return M of an epoch. Raises UsageError where it does not fit the other settings."""
        crops = _of_epoch("crops_per_image", self.crops_per_image, epoch)
        where = _in_epoch(self.crops_per_image, epoch)
        if crops < 1:
            raise UsageError(f"crops_per_image must be at least 1, got {crops}{where}")
        if self.batch_size % crops:
            below = self.batch_size // crops * crops
            fitting = f"{below} or {below + crops}" if below else str(crops)
            raise UsageError(
                f"batch_size {self.batch_size} must be a multiple of crops_per_image {crops}{where}, such as {fitting}"
            )
        batches = self.window_batches_of(crops)
        # The M crops of an image go into M different batches, which a smaller window does not have.
        if batches != 1 and batches < crops:
            raise UsageError(f"spread is {batches} batches; with {crops} crops per image{where}, at least that many")
        # SelfMix takes groups of M rows for the crops of one image, so these must lie side by side.
        if self.selfmix is not None and (batches > 1 or crops < 2):
            raise UsageError(
                "selfmix needs at least 2 crops of an image side by side: crops_per_image >= 2, spread=False; "
                f"crops_per_image is {crops}{where}"
            )
        return crops

    def window_batches_of(self, crops_per_image: int) -> int:
        """Return P, the batches of a window, for this M."""
        if isinstance(self.spread, bool):
            return 2 * crops_per_image if self.spread else 1
        return self.spread

    @property
    def streamed(self) -> bool:
        """Whether labels and images are read shard by shard."""
        return self.order != "global"

    def _check_choices(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if self.selfmix is not None and not isinstance(self.selfmix, SelfMix):
            raise UsageError(f"selfmix must be a SelfMix, such as fd.SelfMix(prob=0.5), got {self.selfmix!r}")
        check_order(self.order)
        for name, kind in CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if self.transform is not None and not callable(self.transform):
            raise UsageError(f"transform must be a function of a crop, uint8 (3, S, S), got {self.transform!r}")
        # Combinations that would leave a setting without effect are refused, and not ignored.
        if self.keys and self.targets == "dense":
            raise UsageError('keys=True needs targets="soft": dense targets are plain tensors, which have no keys')
        if self.transform is not None and self.decode_device is not None:
            raise UsageError("transform needs crops that workers cut: leave out decode_device")
        if self.decode_scale != "exact" and self.decode_device is not None:
            raise UsageError("decode_scale is for decoding in workers: leave out decode_device")
        check_ranks(self.rank, self.world_size)

    def _check_kinds(self) -> None:
        """Raise UsageError for settings that do not go with several crop kinds in a batch."""
        if not self.kinds:
            return
        excluded = {
            "spread": (bool(self.spread), "all crops of an image go into one batch, as multi-crop losses need them"),
            "decode_device": (self.decode_device is not None, "kinds are cut in the workers"),
            "epoch": (self.epoch == "crops", 'with kinds, an epoch is a pass over the images: epoch="images"'),
        }
        for name, (is_set, why) in excluded.items():
            if is_set:
                raise UsageError(f"{name} does not go with kinds: {why}; leave out {name}")
        single = [kind.name for kind in self.kinds if kind.crops_per_image < 2]
        if self.selfmix is not None and single:
            raise UsageError(f"selfmix mixes within each kind, and needs at least 2 crops of {single[0]!r} per image")


def epoch_number(epoch: Any) -> int:
    """Return an epoch's number as a plain int. Raises UsageError for anything but a whole number from 0 on."""
    number = _whole_number("epoch", epoch)
    if number < 0:
        raise UsageError(f"epoch must not be negative, got {number}")
    return number


def counted(name: str, value: Any) -> int:
    """Return a setting that counts something, as a plain int. Raises UsageError for less than 1."""
    number = _whole_number(name, value)
    if number < 1:
        raise UsageError(f"{name} must be at least 1, got {number}")
    return number


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        square = " (a side in pixels: crops are square)" if name == "size" else ""
        raise UsageError(f"{name} must be a whole number{square}, got {value!r}")
    return int(value)


def _of_epoch(name: str, value: int | OfEpoch, epoch: int) -> int:
    """Evaluate a number that may be a function of the epoch."""
    if not callable(value):
        return value
    given: object = value(epoch)
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise UsageError(f"{name} must give a whole number for every epoch; for {epoch} it gave {given!r}")
    return int(given)


def _in_epoch(value: int | OfEpoch, epoch: int) -> str:
    return f" in epoch {epoch}" if callable(value) else ""


def without_functions(settings: LoaderSettings) -> LoaderSettings:
    """Return a copy without functions of the epoch, for processes that are told their values."""
    # Not `replace`, whose check would refuse None. Workers never evaluate these settings: see `Epochs.learn`.
    sent = copy.copy(settings)
    for name in ("calibration", *OF_EPOCH):
        if callable(getattr(sent, name)):
            object.__setattr__(sent, name, None)
    return sent
