"""SelfMix: CutMix or Mixup between two crops of the same image (FerKD, ICCV 2023).

It disturbs soft labels far less than mixing strangers does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ferkd_data.errors import UsageError
from ferkd_data.mixing import Per, check_mixing, cutmix, mixup
from ferkd_data.targets import SoftTargets


@dataclass(frozen=True, kw_only=True)
class SelfMix:
    """Mixes within groups of consecutive crops of one image, as `CropLoader` lays out its batches."""

    prob: float = 0.5
    alpha: float = 1.0
    mode: Literal["cutmix", "mixup", "both"] = "cutmix"
    """both: one of them, by a fair coin for each batch."""
    per: Per = "batch"

    def __post_init__(self) -> None:
        check_mixing(self.prob, self.alpha, self.per)
        if self.mode not in ("cutmix", "mixup", "both"):
            raise UsageError(f"mode must be cutmix, mixup or both, got {self.mode!r}")

    def __call__(
        self,
        images: Tensor,
        targets: SoftTargets,
        *,
        crops_per_image: int,
        rng: np.random.Generator,
        inplace: bool = False,
    ) -> tuple[Tensor, SoftTargets]:
        """Mix images (B, 3, H, W) and targets whose rows are groups of `crops_per_image` crops of one image.

        Raises UsageError when a group has one crop, or B is no multiple of the group's size.
        """
        partner = partners(len(images), crops_per_image, rng)
        use_mixup = self.mode == "mixup" or (self.mode == "both" and rng.random() < 0.5)
        mix = mixup if use_mixup else cutmix
        return mix(images, targets, partner, self.prob, self.alpha, self.per, rng, inplace)


def partners(num: int, crops_per_image: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """For each crop, another crop of its own image, by the same random rule in every group.

    An even group is cut into pairs that mix with each other, as the rounds of a tournament are; an odd one is turned
    by a step.
    """
    if crops_per_image < 2 or num % crops_per_image:
        raise UsageError(
            f"SelfMix needs at least 2 crops of each image side by side; {num} crops in groups of {crops_per_image}"
        )
    step = int(rng.integers(1, crops_per_image))
    place = np.arange(crops_per_image)
    if crops_per_image % 2:
        other = (place + step) % crops_per_image
    else:
        last = crops_per_image - 1
        other = (step - place) % last
        # One meets itself, and the last, for which the rule has no place: these two are the pair that is left.
        alone = int(np.flatnonzero(other[:last] == place[:last])[0])
        other[alone], other[last] = last, alone
    return np.add.outer(np.arange(0, num, crops_per_image), other).reshape(-1)
