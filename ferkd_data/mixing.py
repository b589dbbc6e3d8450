"""CutMix (Yun et al., ICCV 2019) and Mixup (Zhang et al., ICLR 2018) on batches of images and their targets.

Images are (B, 3, H, W), uint8 or float, on any device. Random numbers are drawn on the CPU from the `rng` given, a few
per batch or sample: a batch mixed on a GPU is the batch mixed on a CPU, and nothing waits for the device.

On a CPU, uint8 images are blended by PyTorch's resize kernel, the only loop over bytes at hand that is vectorised. Two
images that lie one behind the other in memory are the two rows of one picture. The row between them, at a distance f
from the first, is 1 - f of the one and f of the other, rounded to the nearest level, a half up. The kernel's weights
have 14 bits or more, so it is exact for shares that are multiples of 1/128.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.errors import UsageError
from ferkd_data.targets import SoftTargets, check_positive

CHANNELS = 3
"""Bytes that the kernel takes for a pixel; it is vectorised for 3 and 4."""
_resize_into: Any = torch._C._nn.upsample_bilinear2d


def can_blend(images: Tensor) -> bool:
    """Return whether `blend_cycles` takes these images: uint8, dense in memory, and the kernel is vectorised here."""
    one = images[:1]
    dense = one.is_contiguous() or one.is_contiguous(memory_format=torch.channels_last)
    whole = one.numel() % CHANNELS == 0
    fast = images.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return images.dtype == torch.uint8 and dense and whole and fast


def blend_cycles(images: Tensor, cycles: Iterable[list[int]], share: Sequence[float]) -> None:
    """In place: along each cycle b, c, d ..., image b becomes share[b] of itself and the rest of c, and so on to b.

    Two that blend with each other by the same share keep their sum: the second is this sum minus the new first, at half
    the cost. Elsewhere an image is copied aside once, so that the two to be blended lie one behind the other.
    """
    size_bytes = images[0].numel()
    width = size_bytes // CHANNELS
    # NumPy copies and adds bytes in less time than PyTorch needs to begin.
    pixels = images.as_strided((len(images), size_bytes), (images.stride(0), 1)).numpy()
    # Any order of bytes serves, as blending looks at each alone: every 3 in a row are called a pixel.
    outputs = images.as_strided((len(images), 1, CHANNELS, 1, width), (images.stride(0), 0, 1, size_bytes, CHANNELS))
    output = outputs.unbind()
    aside = torch.empty((3, size_bytes), dtype=torch.uint8, device="cpu")
    copies = aside.numpy()
    pairs = [aside[k:].as_strided((1, CHANNELS, 2, width), (0, 1, size_bytes, CHANNELS)) for k in range(2)]

    def blend(row: int, spot: int, other: int) -> None:
        if share[row] != 1:
            distance = 1 - share[row] if spot < other else share[row]
            # The first row of the output lies at scale / 2 - 1 / 2 of the input; asked for is 1 / scale.
            scales = (1 / (1 + 2 * distance), None)
            _resize_into(pairs[min(spot, other)], [1, width], False, *scales, out=output[row])

    for cycle in cycles:
        # `spot` is the number of the copy that holds the image to be blended next.
        copies[0] = pixels[cycle[0]]
        spot = 0
        if keeps_sum(cycle, share):
            first, second = pixels[cycle[0]], pixels[cycle[1]]
            copies[1] = second
            blend(cycle[0], 0, 1)
            # Beyond 255 both wrap around, which cancels.
            np.add(second, copies[0], out=second)
            np.subtract(second, first, out=second)
            continue
        for row, following in itertools.pairwise(cycle):
            beside = 2 if spot == 1 else 1
            copies[beside] = pixels[following]
            blend(row, spot, beside)
            spot = beside
        # The last image must lie beside the first, which is at 0 of the copies.
        if spot == 2:
            copies[1] = copies[2]
        if spot:
            blend(cycle[-1], 1, 0)


def keeps_sum(cycle: list[int], share: Sequence[float]) -> bool:
    """Return whether a cycle is two images that blend with each other by the same share, so that their sum stays."""
    return len(cycle) == 2 and share[cycle[0]] == share[cycle[1]]


Per = Literal["batch", "sample"]
LEVELS = 128
"""Mixup's shares of uint8 images are multiples of 1/128, so that 16-bit integers hold every product."""


@dataclass(frozen=True, kw_only=True)
class CutMix:
    """CutMix: paste a rectangle of another image of the batch; a target's share is the area that stayed.

    Calling it takes images (B, 3, H, W) and SoftTargets of B crops, and returns both mixed; the images given stay as
    they are unless `inplace`. Raises UsageError for values out of range, and where B differs.

    >>> import numpy as np, torch
    >>> images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    >>> targets = fd.SoftTargets(
    ...     index=torch.tensor([[0], [1], [2], [3]]), weight=torch.ones(4, 1), floor=torch.zeros(4), num_classes=5
    ... )
    >>> mixed, soft = fd.CutMix(alpha=1.0)(images, targets, rng=np.random.default_rng(0))
    >>> mixed.shape, soft
    (torch.Size([4, 3, 32, 32]), SoftTargets(4 rows, 5 classes, 2 sparse entries, float32 on cpu))
    """

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
        """Paste a rectangle of image b's random partner over image b, for each b. Returns images and targets.

        `rng` decides the partners and rectangles; `inplace` changes the images given.
        """
        check_rng(rng)
        partner = rng.permutation(len(images))
        return cutmix(images, targets, partner, self.prob, self.alpha, self.per, rng, inplace)


@dataclass(frozen=True, kw_only=True)
class Mixup:
    """Mixup: blend with another image of the batch; images and targets get the same share, from Beta(alpha, alpha).

    Called as `CutMix` is. uint8 images stay uint8, rounded to the nearest level.

    >>> import numpy as np, torch
    >>> images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    >>> targets = fd.SoftTargets(
    ...     index=torch.tensor([[0], [1], [2], [3]]), weight=torch.ones(4, 1), floor=torch.zeros(4), num_classes=5
    ... )
    >>> mixed, soft = fd.Mixup(alpha=0.2)(images, targets, rng=np.random.default_rng(0))
    >>> mixed.dtype, soft.dense().sum(dim=1)
    (torch.uint8, tensor([1., 1., 1., 1.]))
    """

    prob: float = 1.0
    """Probability that a batch (or sample) is mixed."""
    alpha: float = 0.2
    """The share of the image itself is drawn from Beta(alpha, alpha)."""
    per: Per = "batch"
    """One share for the whole batch, or one for each sample."""

    def __post_init__(self) -> None:
        check_mixing(self.prob, self.alpha, self.per)

    def __call__(
        self, images: Tensor, targets: SoftTargets, *, rng: np.random.Generator, inplace: bool = False
    ) -> tuple[Tensor, SoftTargets]:
        """Blend each image with a random partner. Returns images and targets.

        `rng` decides the partners and shares; `inplace` changes the images given.
        """
        check_rng(rng)
        partner = rng.permutation(len(images))
        return mixup(images, targets, partner, self.prob, self.alpha, self.per, rng, inplace)


def check_rng(rng: Any) -> None:
    """Raise UsageError for anything but a generator of NumPy: a seed, or a generator of PyTorch."""
    if not isinstance(rng, np.random.Generator):
        raise UsageError(
            f"rng must be a generator of NumPy, such as fd.generator(seed, rank, epoch, step), got {rng!r}; made anew "
            "for each batch, it mixes the batch alike in a training that was resumed"
        )


def check_mixing(prob: float, alpha: float, per: str) -> None:
    """Raise UsageError for settings of CutMix, Mixup or SelfMix that are out of range."""
    if not 0 <= prob <= 1:
        raise UsageError(f"prob must be in 0..1, got {prob}")
    check_positive("alpha", alpha)
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
    """Paste a rectangle of image partner[b], a permutation, over image b.

    Returns new images (`images` itself when `inplace`). Raises UsageError when images and targets differ in number.
    """
    num, height, width = num_rows(images, targets), images.shape[2], images.shape[3]
    boxes = _rectangles(1 if per == "batch" else num, height, width, prob, alpha, rng)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # The area that was really pasted: rectangles are clipped at the edges (Yun et al.'s corrected lambda).
    share = _per_sample(1 - area / (height * width), num)
    mixed = images if inplace else images.clone()
    if area.any():
        paste = paste_one_by_one if _one_by_one(images) else paste_at_once
        paste(mixed, partner, boxes)
    return mixed, _mix_targets(targets, partner, share)


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
    """Blend image b with image partner[b]; uint8 is rounded to the nearest level. As `cutmix` otherwise.

    Two images that blend with each other do so by the same share, and keep their sum.
    """
    num = num_rows(images, targets)
    count = 1 if per == "batch" else num
    own = np.where(rng.random(count) < prob, rng.beta(alpha, alpha, count), 1.0)
    if per == "sample":
        row = np.arange(num)
        # Of two that mix with each other, both take the share of the first.
        own = own[np.where(partner[partner] == row, np.minimum(row, partner), row)]
    if images.dtype == torch.uint8:
        # The targets get the rounded share too, since the images do.
        own = np.rint(own * LEVELS) / LEVELS
    # What the images' type cannot hold of a share, the targets do not get either.
    share_type = torch.float32 if images.dtype == torch.uint8 else images.dtype
    share = _per_sample(own, num).to(share_type).float()
    mixed = images if inplace else images.clone()
    if (share != 1).any():
        blend = blend_one_by_one if _one_by_one(images) else blend_at_once
        blend(mixed, partner, share)
    return mixed, _mix_targets(targets, partner, share)


def paste_one_by_one(images: Tensor, partner: npt.NDArray[np.int64], boxes: npt.NDArray[np.int64]) -> None:
    """In place, touching no pixel outside the boxes: a CPU is bound by its memory."""
    # NumPy has no bfloat16, and bits are moved here, not numbers.
    same_bits = images.view(torch.int16) if images.dtype == torch.bfloat16 else images
    # Runs along the last axis are copied whole.
    channels_last = images.stride(1) == 1
    pixels = (same_bits.permute(0, 2, 3, 1) if channels_last else same_bits).numpy()
    rectangles = [_rectangle(box, channels_last) for box in np.broadcast_to(boxes, (len(images), 4)).tolist()]
    # Each image reads from the next one in its cycle before that is overwritten; the first one's pixels are kept aside.
    for cycle in cycles(partner):
        last = cycle[-1]
        of_first = pixels[cycle[0]][rectangles[last]].copy()
        for row, other in itertools.pairwise(cycle):
            pixels[row][rectangles[row]] = pixels[other][rectangles[row]]
        pixels[last][rectangles[last]] = of_first


def paste_at_once(images: Tensor, partner: npt.NDArray[np.int64], boxes: npt.NDArray[np.int64]) -> None:
    """In place, for the whole batch in a few kernels."""
    partner_t = torch.from_numpy(partner).to(images.device, non_blocking=True)
    if len(boxes) == 1:
        top, left, bottom, right = boxes[0].tolist()
        # The right side is a copy (an index selects), so no image reads what was pasted already.
        images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right][partner_t]
        return
    # One transfer for all four edges.
    edges = torch.from_numpy(boxes.T.copy()).to(images.device, non_blocking=True)
    top, left, bottom, right = edges[:, :, None]
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    images.copy_(torch.where(inside[:, None], images[partner_t], images))


def blend_one_by_one(images: Tensor, partner: npt.NDArray[np.int64], share: Tensor) -> None:
    """In place, each image's intermediates small enough for a CPU's cache."""
    if can_blend(images):
        blend_cycles(images, cycles(partner), share.tolist())
        return
    half = _half(partner, share)
    for cycle in cycles(partner):
        first = images[cycle[0]].clone()
        for row, other in itertools.pairwise(cycle):
            images[row].copy_(_blend(images[row], images[other], share[row], half[row]))
        last = cycle[-1]
        images[last].copy_(_blend(images[last], first, share[last], half[last]))


def blend_at_once(images: Tensor, partner: npt.NDArray[np.int64], share: Tensor) -> None:
    """In place, for the whole batch in a few kernels."""
    others = images[torch.from_numpy(partner).to(images.device, non_blocking=True)]
    per_row = (t.to(images.device, non_blocking=True)[:, None, None, None] for t in (share, _half(partner, share)))
    images.copy_(_blend(images, others, *per_row))


def cycles(partner: npt.NDArray[np.int64]) -> Iterator[list[int]]:
    """Yield the cycles b, partner[b], partner[partner[b]] ... of a permutation.

    Along a cycle an image can be overwritten once the one before it has read it: only the first must be kept aside.
    """
    following = partner.tolist()
    seen = [False] * len(following)
    for start in range(len(following)):
        cycle, row = [], start
        while not seen[row]:
            seen[row] = True
            cycle.append(row)
            row = following[row]
        if cycle:
            yield cycle


def _one_by_one(images: Tensor) -> bool:
    # Working in place, image by image, leaves no graph for gradients.
    return images.device.type == "cpu" and not images.requires_grad


def _rectangle(box: list[int], channels_last: bool) -> tuple[Any, ...]:
    top, left, bottom, right = box
    rectangle = (slice(top, bottom), slice(left, right))
    return rectangle if channels_last else (..., *rectangle)


def _half(partner: npt.NDArray[np.int64], share: Tensor) -> Tensor:
    """Return the rounding term (B,) int16. A half is rounded up, but down where two images keep their sum."""
    half = torch.full((len(partner),), LEVELS // 2, dtype=torch.int16, device="cpu")
    shares = share.tolist()
    half[[cycle[1] for cycle in cycles(partner) if keeps_sum(cycle, shares)]] -= 1
    return half


def _blend(image: Tensor, other: Tensor, share: Tensor, half: Tensor) -> Tensor:
    """uint8 levels come back as int16."""
    if image.dtype != torch.uint8:
        return other.lerp(image, share.to(image.dtype))
    levels = (share * LEVELS).round().to(torch.int16)
    # At most 255 * 128 = 32,640, and 64 more for rounding: int16 holds 32,767.
    mixed = image.to(torch.int16).mul_(levels).add_(other.to(torch.int16).mul_(LEVELS - levels))
    # A shift by 7 divides by 128.
    return mixed.add_(half).bitwise_right_shift_(7)


def _rectangles(
    count: int, height: int, width: int, prob: float, alpha: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw rectangles (count, 4): top, left, bottom, right, clipped to the image; empty where nothing is mixed."""
    # Both are drawn in any case, so that the numbers drawn later do not depend on `prob`.
    own = np.where(rng.random(count) < prob, rng.beta(alpha, alpha, count), 1.0)
    # A rectangle of the image's shape and 1 - own of its area.
    side = np.sqrt(1 - own)
    box_h, box_w = (side * height).astype(np.int64), (side * width).astype(np.int64)
    row, column = rng.integers(0, height, count), rng.integers(0, width, count)
    top, left = np.maximum(row - box_h // 2, 0), np.maximum(column - box_w // 2, 0)
    bottom = np.minimum(row - box_h // 2 + box_h, height)
    right = np.minimum(column - box_w // 2 + box_w, width)
    return np.stack([top, left, bottom, right], axis=1)


def num_rows(images: Tensor, targets: SoftTargets) -> int:
    """Return B. Raises UsageError for images and targets that cannot be mixed."""
    if not isinstance(targets, SoftTargets):
        raise UsageError(
            f"mixing takes SoftTargets, got {type(targets).__name__}; torchvision's v2.CutMix and v2.MixUp take dense "
            "targets"
        )
    if len(images) != len(targets):
        raise UsageError(f"{len(images)} images have {len(targets)} targets")
    if images.dim() != 4 or (images.shape[3] == CHANNELS != images.shape[1]):
        hint = "; permute(0, 3, 1, 2) brings the channels to the front" if images.dim() == 4 else ""
        raise UsageError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}{hint}")
    return len(images)


def _mix_targets(targets: SoftTargets, partner: npt.NDArray[np.int64], share: Tensor) -> SoftTargets:
    partner_t = torch.from_numpy(partner).to(targets.device, non_blocking=True)
    return targets.mix(partner_t, share.to(targets.device, non_blocking=True))


def _per_sample(share: npt.NDArray[np.float64], num: int) -> Tensor:
    return torch.from_numpy(np.broadcast_to(share, (num,)).astype(np.float32))
