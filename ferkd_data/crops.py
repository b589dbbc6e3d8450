"""Which crops an image gets: RandomResizedCrop as a pure function of (seed, key, crop number).

Legend: N crops. A box is four integers (top, left, height, width) in pixels of the decoded image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.errors import ImageError, UsageError

MAX_SIDE = 65535
"""Boxes are stored as uint16, so no side of an image may be longer."""

ATTEMPTS = 10
"""How often RandomResizedCrop draws a shape before it falls back to the central crop (torchvision's constant)."""

WORDS_PER_CROP = 24
"""2 words for each attempt, 2 for the corner, 1 for the flip, 1 spare: a whole number of Philox counters (4 words)."""


class Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class CropDistribution:
    """The settings of torchvision's RandomResizedCrop and RandomHorizontalFlip."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height; drawn uniformly in its logarithm."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(f"scale must be 0 < LO <= HI <= 1, got {self.scale[0]} {self.scale[1]}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise UsageError(f"ratio must be 0 < LO <= HI, got {self.ratio[0]} {self.ratio[1]}")
        if not 0 <= self.hflip <= 1:
            raise UsageError(f"hflip must be a probability, got {self.hflip}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Crops:
    boxes: npt.NDArray[np.uint16]
    """(N, 4): top, left, height, width."""
    flip: npt.NDArray[np.bool_]
    """(N,)"""
    operations: npt.NDArray[np.uint16] | None = None
    """(N, W): recorded augmentations, as `augment.Operations.pack` puts them; None or W = 0 for none."""

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> Crops:
        """The crops of these rows."""
        operations = None if self.operations is None else self.operations[rows]
        return Crops(boxes=self.boxes[rows], flip=self.flip[rows], operations=operations)


def check_size(height: int, width: int) -> None:
    """Raise ImageError for an image whose boxes could not be stored."""
    if height < 1 or width < 1:
        raise ImageError("zero_sized", f"the image is {width}x{height} pixels")
    if height > MAX_SIDE or width > MAX_SIDE:
        raise ImageError("too_large", f"the image is {width}x{height} pixels; no side may exceed {MAX_SIDE}")


def draw_crops(
    key: str,
    height: int,
    width: int,
    *,
    seed: int,
    first: int = 0,
    count: int,
    distribution: CropDistribution,
) -> Crops:
    """Crops number `first` .. `first + count - 1` of the image `key`.

    Crop n uses words 24n .. 24n+23 of a Philox stream keyed by a hash of (seed, key): so it depends on
    (seed, key, n) and the image's size alone, and asking for more crops later keeps the first ones.
    The distribution is that of torchvision.transforms.RandomResizedCrop followed by RandomHorizontalFlip.

    Raises ImageError when a side is 0 or longer than MAX_SIDE.
    """
    check_size(height, width)
    stream = rng.philox("crop", seed, key)
    stream.advance(first * (WORDS_PER_CROP // 4))
    u = rng.uniforms(stream.random_raw(count * WORDS_PER_CROP)).reshape(count, WORDS_PER_CROP)

    area = height * width * _between(u[:, 0:ATTEMPTS], *distribution.scale)
    log_lo, log_hi = math.log(distribution.ratio[0]), math.log(distribution.ratio[1])
    ratio = np.exp(_between(u[:, ATTEMPTS : 2 * ATTEMPTS], log_lo, log_hi))
    widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first_fit = fits.argmax(axis=1)
    rows = np.arange(count)
    box_h, box_w = heights[rows, first_fit], widths[rows, first_fit]
    top = np.floor(u[:, 2 * ATTEMPTS] * (height - box_h + 1)).astype(np.int64)
    left = np.floor(u[:, 2 * ATTEMPTS + 1] * (width - box_w + 1)).astype(np.int64)

    boxes = np.stack([top, left, box_h, box_w], axis=1)
    boxes[~fits.any(axis=1)] = central_box(height, width, distribution)
    flip = u[:, 2 * ATTEMPTS + 2] < distribution.hflip
    return Crops(boxes=boxes.astype(np.uint16), flip=flip)


def central_box(height: int, width: int, distribution: CropDistribution) -> Box:
    """The largest central box whose ratio is allowed: what RandomResizedCrop falls back to."""
    ratio_lo, ratio_hi = distribution.ratio
    box_h, box_w = height, width
    if width / height < ratio_lo:
        box_h = min(height, max(1, round(width / ratio_lo)))
    elif width / height > ratio_hi:
        box_w = min(width, max(1, round(height * ratio_hi)))
    return Box((height - box_h) // 2, (width - box_w) // 2, box_h, box_w)


def _between(u: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.float64]:
    return low + u * (high - low)
