"""Draw the crops of an image: RandomResizedCrop as a pure function of (seed, key, crop number).

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
"""Longest side of an image in pixels: boxes are stored as uint16."""

ATTEMPTS = 10
"""Shapes that RandomResizedCrop draws before it falls back to the central crop (torchvision's constant)."""

WORDS_PER_CROP = 24
"""Random 64-bit words of a crop: 2 for each attempt, 2 for the corner, 1 for the flip, 1 spare. A multiple of 4, since
a Philox counter gives 4 words."""


class Box(NamedTuple):
    """A rectangle in pixels of the decoded image: rows top .. top + height - 1, columns left .. left + width - 1.

    >>> box = fd.Box(top=30, left=12, height=88, width=104)
    >>> box.height * box.width
    9152
    """

    top: int
    """Rows above the box."""
    left: int
    """Columns to the left of the box."""
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class CropDistribution:
    """Settings of torchvision's RandomResizedCrop (Szegedy et al., 2015) and RandomHorizontalFlip.

    Raises UsageError for values outside their ranges.

    >>> fd.CropDistribution(scale=(0.25, 1.0)).hflip
    0.5
    """

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area, drawn uniformly; 0 < LO <= HI <= 1."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height; its logarithm is drawn uniformly."""
    hflip: float = 0.5
    """Probability of a horizontal flip, in 0..1."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(f"scale must be 0 < LO <= HI <= 1, got {self.scale[0]} {self.scale[1]}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise UsageError(f"ratio must be 0 < LO <= HI, got {self.ratio[0]} {self.ratio[1]}")
        if not 0 <= self.hflip <= 1:
            raise UsageError(f"hflip must be a probability, got {self.hflip}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Crops:
    """N crops of one image. `len(crops)` is N; `crops[rows]` selects some of them.

    >>> crops = fd.draw_crops("n01440764/4711", 375, 500, seed=0, count=6, distribution=fd.CropDistribution())
    >>> len(crops), crops.boxes.shape, len(crops[:2])
    (6, (6, 4), 2)
    """

    boxes: npt.NDArray[np.uint16]
    """(N, 4): top, left, height, width in pixels of the decoded image."""
    flip: npt.NDArray[np.bool_]
    """(N,): the crop is mirrored horizontally after it is cut."""
    operations: npt.NDArray[np.uint16] | None = None
    """(N, W): recorded augmentations, packed by `augment.Operations.pack`; None or W = 0 for none."""

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> Crops:
        """Select crops by a slice or by their numbers."""
        operations = None if self.operations is None else self.operations[rows]
        return Crops(boxes=self.boxes[rows], flip=self.flip[rows], operations=operations)


def check_size(height: int, width: int) -> None:
    """Raise ImageError for an image with a side of 0 or above MAX_SIDE, whose boxes could not be stored."""
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
    """Draw crops number `first` .. `first + count - 1` of the image `key`, of `height` x `width` pixels.

    The distribution is that of torchvision.transforms.RandomResizedCrop followed by RandomHorizontalFlip. Crop n uses
    words 24n .. 24n+23 of a Philox stream keyed by a hash of (seed, key). So it depends on (seed, key, n) and the
    image's size alone, and drawing further crops later leaves the first ones unchanged.

    Raises ImageError where a side is 0 or above 65,535.

    >>> distribution = fd.CropDistribution()
    >>> crops = fd.draw_crops("n01440764/4711", 375, 500, seed=0, count=100, distribution=distribution)
    >>> later = fd.draw_crops("n01440764/4711", 375, 500, seed=0, first=98, count=2, distribution=distribution)
    >>> crops.boxes.dtype, bool((later.boxes == crops.boxes[98:]).all())
    (dtype('uint16'), True)
    """
    check_size(height, width)
    stream = rng.philox("crop", seed, key)
    # In counters of 4 words: the stream stands at word 24 * first without having drawn those before.
    stream.advance(first * (WORDS_PER_CROP // 4))
    u = rng.uniforms(stream.random_raw(count * WORDS_PER_CROP)).reshape(count, WORDS_PER_CROP)

    # All attempts of all crops are drawn at once, (N, ATTEMPTS); the first that fits into the image counts.
    area = height * width * _between(u[:, 0:ATTEMPTS], *distribution.scale)
    log_lo, log_hi = math.log(distribution.ratio[0]), math.log(distribution.ratio[1])
    ratio = np.exp(_between(u[:, ATTEMPTS : 2 * ATTEMPTS], log_lo, log_hi))
    # width * height = area and width / height = ratio. rint rounds halves to even, as torchvision's `round` does.
    widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    # The first True of a row; 0 for a row without any, whose box is replaced below before it is stored as uint16.
    first_fit = fits.argmax(axis=1)
    rows = np.arange(count)
    box_h, box_w = heights[rows, first_fit], widths[rows, first_fit]
    # Uniform over 0 .. height - box_h: u < 1, so the floor never reaches height - box_h + 1.
    top = np.floor(u[:, 2 * ATTEMPTS] * (height - box_h + 1)).astype(np.int64)
    left = np.floor(u[:, 2 * ATTEMPTS + 1] * (width - box_w + 1)).astype(np.int64)

    boxes = np.stack([top, left, box_h, box_w], axis=1)
    boxes[~fits.any(axis=1)] = central_box(height, width, distribution)
    flip = u[:, 2 * ATTEMPTS + 2] < distribution.hflip
    return Crops(boxes=boxes.astype(np.uint16), flip=flip)


def central_box(height: int, width: int, distribution: CropDistribution) -> Box:
    """Return the largest central box with an allowed ratio, to which RandomResizedCrop falls back."""
    ratio_lo, ratio_hi = distribution.ratio
    box_h, box_w = height, width
    # Narrower than allowed: the whole width, less height. Wider than allowed: the whole height, less width.
    if width / height < ratio_lo:
        box_h = min(height, max(1, round(width / ratio_lo)))
    elif width / height > ratio_hi:
        box_w = min(width, max(1, round(height * ratio_hi)))
    return Box((height - box_h) // 2, (width - box_w) // 2, box_h, box_w)


def _between(u: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.float64]:
    return low + u * (high - low)
