"""`LoaderSettings`: everything that decides what a loader gives, checked when it is made.

`CropLoader` and `CropDataset` take the same values as flat keyword arguments and bring them here; the parts of the
loader read them from here. To add a setting, add a field with its check, and a parameter of `CropLoader`.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import torch

from ferkd_data.calibration import Schedule, calibration_at
from ferkd_data.errors import UsageError
from ferkd_data.loader.order import OrderKind, check_order
from ferkd_data.replay import INTERPOLATIONS, Interpolation
from ferkd_data.selfmix import SelfMix

Verify = Literal["first_epoch", "always", "never"]
OnError = Literal["raise", "skip"]
ImagesMissing = Literal["raise", "drop"]
AT_LEAST = {
    "batch_size": 1,
    "crops_per_image": 1,
    "shards_together": 1,
    "num_workers": 0,
    "prefetch_factor": 1,
}
"""The smallest value of each setting that counts something."""
WHOLE_NUMBERS = (*AT_LEAST, "size", "seed", "rank", "world_size")
SWITCHES = ("drop_last", "pin_memory")
MAX_SIZE = 8192


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """Settings of a loader; see `CropLoader` for what each does. Raises UsageError for values that cannot be right.

    Whole numbers are kept as plain `int`, whatever integer type they came in, so that a saved state is plain JSON.
    """

    batch_size: int
    """Crops per batch and rank, B."""
    crops_per_image: int = 4
    """M."""
    size: int = 224
    """Side of a crop in pixels, S."""
    interpolation: Interpolation = "bilinear"
    calibration: Schedule = "ferkd"
    selfmix: SelfMix | None = None
    spread: bool | int = False
    """Batches of a window: True for 2 * M, False for 1. See `window_batches`."""
    order: OrderKind = "global"
    shards_together: int = 8
    drop_last: bool = True
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    prefetch_factor: int = 2
    """Windows that each worker makes ahead."""
    pin_memory: bool = False
    decode_device: str | torch.device | None = None
    verify_images: Verify = "first_epoch"
    on_error: OnError = "raise"
    images_missing: ImagesMissing = "raise"
    """What labelled images that the source lacks do."""

    def __post_init__(self) -> None:
        for name in WHOLE_NUMBERS:
            object.__setattr__(self, name, _whole_number(name, getattr(self, name)))
        if not isinstance(self.spread, bool):
            object.__setattr__(self, "spread", _whole_number("spread", self.spread))
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, least in AT_LEAST.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        self._check_choices()
        self._check_batches()
        calibration_at(self.calibration, 0)
        if self.num_workers:
            _check_can_be_sent(self.calibration)

    @property
    def window_batches(self) -> int:
        """P: how many batches a rank makes together, from images that are decoded once."""
        if isinstance(self.spread, bool):
            return 2 * self.crops_per_image if self.spread else 1
        return self.spread

    @property
    def window_images(self) -> int:
        """Images of a rank's whole window."""
        return self.window_batches * self.batch_size // self.crops_per_image

    @property
    def streamed(self) -> bool:
        """Whether labels and images are read shard by shard."""
        return self.order != "global"

    def _check_choices(self) -> None:
        if not 1 <= self.size <= MAX_SIZE:
            raise UsageError(f"size must be 1..{MAX_SIZE}, got {self.size}")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if self.selfmix is not None and not isinstance(self.selfmix, SelfMix):
            raise UsageError(f"selfmix must be a SelfMix, such as fd.SelfMix(prob=0.5), got {self.selfmix!r}")
        check_order(self.order)
        for name, kind in (("verify_images", Verify), ("on_error", OnError), ("images_missing", ImagesMissing)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")

    def _check_batches(self) -> None:
        if self.batch_size % self.crops_per_image:
            raise UsageError(
                f"batch_size {self.batch_size} must be a multiple of crops_per_image {self.crops_per_image}"
            )
        if self.window_batches != 1 and self.window_batches < self.crops_per_image:
            raise UsageError(
                f"spread is {self.window_batches} batches; with {self.crops_per_image} crops per image, at least that "
                "many"
            )
        if self.selfmix is not None and (self.window_batches > 1 or self.crops_per_image < 2):
            raise UsageError(
                "selfmix needs at least 2 crops of an image side by side: crops_per_image >= 2, spread=False"
            )
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank must be 0..{self.world_size - 1}, got {self.rank}")


def epoch_number(epoch: Any) -> int:
    """An epoch's number as a plain int. Raises UsageError for anything but a whole number from 0 on."""
    number = _whole_number("epoch", epoch)
    if number < 0:
        raise UsageError(f"epoch must not be negative, got {number}")
    return number


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def _check_can_be_sent(calibration: Schedule) -> None:
    """To worker processes."""
    try:
        pickle.dumps(calibration)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"calibration cannot be sent to worker processes ({error}); define it at the top level of a module, "
            "or use num_workers=0"
        ) from error
