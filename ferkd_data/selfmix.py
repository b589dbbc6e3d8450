"""SelfMix: CutMix or Mixup between two crops of the same image (FerKD, ICCV 2023).

Crops of one image have similar soft labels, so that mixing them changes targets less than mixing images does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ferkd_data.errors import UsageError
from ferkd_data.mixing import Per, check_mixing, check_rng, cutmix, mixup, num_rows
from ferkd_data.targets import SoftTargets


@dataclass(frozen=True, kw_only=True)
class SelfMix:
    """SelfMix: CutMix or Mixup within groups of consecutive crops of one image (FerKD, ICCV 2023).

    `CropLoader(selfmix=...)` applies it; called by hand, it takes images (B, 3, H, W), uint8 or float, and SoftTargets
    whose groups of `crops_per_image` are crops of one image. Raises UsageError for values out of range.

    >>> import numpy as np, torch
    >>> loader = fd.CropLoader(fd.open_labels("labels-with-images"), batch_size=4, crops_per_image=2, size=32)
    >>> images, targets = next(iter(loader))
    >>> mix = fd.SelfMix(prob=0.5, mode="both")
    >>> images, targets = mix(images, targets, crops_per_image=2, rng=np.random.default_rng(0))
    >>> images.shape
    torch.Size([4, 3, 32, 32])
    """

    prob: float = 0.5
    """Probability that a batch (or sample) is mixed."""
    alpha: float = 1.0
    """The share that a crop keeps is drawn from Beta(alpha, alpha)."""
    mode: Literal["cutmix", "mixup", "both"] = "cutmix"
    """both: one of them, by a fair coin for each batch."""
    per: Per = "batch"
    """One rectangle or share for the whole batch, or one for each sample."""

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

        Raises UsageError when a group has one crop, B is no multiple of the group's size, or the targets know that the
        crops of a group are of several images (`targets.rows`, on the CPU).
        """
        check_rng(rng)
        partner = partners(num_rows(images, targets), crops_per_image, rng)
        _check_groups(targets, crops_per_image)
        use_mixup = self.mode == "mixup" or (self.mode == "both" and rng.random() < 0.5)
        mix = mixup if use_mixup else cutmix
        return mix(images, targets, partner, self.prob, self.alpha, self.per, rng, inplace)


def _check_groups(targets: SoftTargets, crops_per_image: int) -> None:
    rows = targets.rows
    # Elsewhere the comparison would wait for the device.
    if rows is None or rows.device.type != "cpu":
        return
    groups = rows.view(-1, crops_per_image)
    if bool((groups != groups[:, :1]).any()):
        raise UsageError(
            f"SelfMix mixes crops of one image, and these do not lie side by side in groups of {crops_per_image}: give "
            "the loader's crops_per_image, and leave out spread="
        )


def partners(num: int, crops_per_image: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Pair each crop with another crop of its image, (B,), by the same random rule in every group.

    An even group is cut into pairs that mix with each other, as the rounds of a tournament are; in an odd one,
    each crop mixes with the one a random step after it.
    """
    if crops_per_image < 2 or num % crops_per_image:
        raise UsageError(
            f"SelfMix needs at least 2 crops of each image side by side; {num} crops in groups of {crops_per_image}"
        )
    # 1 .. M - 1: no crop is its own partner. Of even M, it is the round of the tournament.
    step = int(rng.integers(1, crops_per_image))
    crop = np.arange(crops_per_image)
    if crops_per_image % 2:
        other = (crop + step) % crops_per_image
    else:
        last = crops_per_image - 1
        # The circle method: pairs that add up to `step` modulo M - 1, an odd number, so that one alone meets itself.
        other = (step - crop) % last
        # One meets itself, and the rule does not cover the last: these two are the pair that is left.
        alone = int(np.flatnonzero(other[:last] == crop[:last])[0])
        other[alone], other[last] = last, alone
    return np.add.outer(np.arange(0, num, crops_per_image), other).reshape(-1)
