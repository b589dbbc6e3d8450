"""CutMix and Mixup on batches of images and their targets.

CutMix: Yun et al., ICCV 2019. Mixup: Zhang et al., ICLR 2018. Images are (B, 3, H, W), uint8 or float, on any device.
What is random is drawn on the CPU from the `rng` given, as a few numbers per batch or sample, so that a batch mixed on
a GPU is the batch mixed on a CPU and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.errors import UsageError
from ferkd_data.targets import SoftTargets

Per = Literal["batch", "sample"]
LEVELS = 128
"""Mixup's shares of uint8 images are multiples of 1/128, so that 16-bit integers hold every product."""
CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class CutMix:
    """Paste a rectangle of another image; the target's share is the area that stayed."""

    prob: float = 1.0
    """Probability that a batch (or sample) is mixed."""
    alpha: float = 1.0
    """The share that stays is drawn from Beta(alpha, alpha)."""
    per: Per = "batch"
    """One rectangle for the whole batch, or one for each sample."""

    def __post_init__(self) -> None:
        check_mixing(self.prob, self.alpha, self.per)

    def __call__(
        self, images: Tensor, targets: SoftTargets, *, rng: np.random.Generator, inplace: bool = False
    ) -> tuple[Tensor, SoftTargets]:
        partner = rng.permutation(len(images))
        return cutmix(images, targets, partner, self.prob, self.alpha, self.per, rng, inplace)


@dataclass(frozen=True, kw_only=True)
class Mixup:
    """Blend with another image; the target's share is the image's."""

    prob: float = 1.0
    alpha: float = 0.2
    per: Per = "batch"

    def __post_init__(self) -> None:
        check_mixing(self.prob, self.alpha, self.per)

    def __call__(
        self, images: Tensor, targets: SoftTargets, *, rng: np.random.Generator, inplace: bool = False
    ) -> tuple[Tensor, SoftTargets]:
        partner = rng.permutation(len(images))
        return mixup(images, targets, partner, self.prob, self.alpha, self.per, rng, inplace)


def check_mixing(prob: float, alpha: float, per: str) -> None:
    if not 0 <= prob <= 1:
        raise UsageError(f"prob must be in 0..1, got {prob}")
    if alpha <= 0:
        raise UsageError(f"alpha must be positive, got {alpha}")
    if per not in ("batch", "sample"):
        raise UsageError(f"per must be batch or sample, got {per!r}")


def cutmix(
    images: Tensor,
    targets: SoftTargets,
    partner: npt.NDArray[np.int64],
    prob: float,
    alpha: float,
    per: Per,
    rng: np.random.Generator,
    inplace: bool = False,
) -> tuple[Tensor, SoftTargets]:
    """Paste a rectangle of image partner[b] over image b. Returns new images (`images` itself when `inplace`)."""
    num, height, width = len(images), images.shape[2], images.shape[3]
    boxes = _rectangles(1 if per == "batch" else num, height, width, prob, alpha, rng)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    share = _per_sample(1 - area / (height * width), num)
    mixed = images if inplace else images.clone()
    partner_t = torch.from_numpy(partner).to(images.device, non_blocking=True)
    if per == "batch":
        top, left, bottom, right = boxes[0].tolist()
        if area[0]:
            mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right][partner_t]
    else:
        top, left, bottom, right = torch.from_numpy(boxes.T.copy()).to(images.device)[:, :, None]
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
        torch.where(inside[:, None], images[partner_t], images, out=mixed)
    return mixed, targets.mix(partner_t.to(targets.device), share.to(targets.device, non_blocking=True))


def mixup(
    images: Tensor,
    targets: SoftTargets,
    partner: npt.NDArray[np.int64],
    prob: float,
    alpha: float,
    per: Per,
    rng: np.random.Generator,
    inplace: bool = False,
) -> tuple[Tensor, SoftTargets]:
    """Blend image b with image partner[b]; uint8 is rounded to the nearest level."""
    num = len(images)
    count = 1 if per == "batch" else num
    own = np.where(rng.random(count) < prob, rng.beta(alpha, alpha, count), 1.0)
    if images.dtype == torch.uint8:
        own = np.rint(own * LEVELS) / LEVELS
    share = _per_sample(own, num)
    partner_t = torch.from_numpy(partner).to(images.device, non_blocking=True)
    others = images[partner_t]
    mixed = images if inplace else torch.empty_like(images)
    on_device = share.to(images.device, non_blocking=True)
    for start in range(0, num, CHUNK if images.device.type == "cpu" else max(num, 1)):
        rows = slice(start, start + (CHUNK if images.device.type == "cpu" else num))
        mixed[rows] = _blend(images[rows], others[rows], on_device[rows, None, None, None])
    return mixed, targets.mix(partner_t.to(targets.device), share.to(targets.device, non_blocking=True))


def _blend(image: Tensor, other: Tensor, share: Tensor) -> Tensor:
    if image.dtype != torch.uint8:
        return other.lerp(image, share.to(image.dtype))
    own = image.to(torch.int16)
    step = (other.to(torch.int16) - own).mul_(((1 - share) * LEVELS).round().to(torch.int16))
    return own.add_(step.add_(LEVELS // 2).bitwise_right_shift_(7)).to(torch.uint8)


def _rectangles(
    count: int, height: int, width: int, prob: float, alpha: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """(count, 4): top, left, bottom, right, clipped to the image; empty where nothing is to be mixed."""
    own = np.where(rng.random(count) < prob, rng.beta(alpha, alpha, count), 1.0)
    side = np.sqrt(1 - own)
    box_h, box_w = (side * height).astype(np.int64), (side * width).astype(np.int64)
    row, column = rng.integers(0, height, count), rng.integers(0, width, count)
    top, left = np.maximum(row - box_h // 2, 0), np.maximum(column - box_w // 2, 0)
    bottom = np.minimum(row - box_h // 2 + box_h, height)
    right = np.minimum(column - box_w // 2 + box_w, width)
    return np.stack([top, left, bottom, right], axis=1)


def _per_sample(share: npt.NDArray[np.float64], num: int) -> Tensor:
    return torch.from_numpy(np.broadcast_to(share, (num,)).astype(np.float32))
