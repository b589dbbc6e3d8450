"""Replay: cutting a stored crop out of an image again. THE one cutter, used by the builder and the loader.

Legend: N crops, S output side, H and W the image's sides. Pixels are uint8 RGB. A crop is cut, resized with an
antialiased filter (Pillow's: the support grows with the reduction), and then flipped where it says so.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.crops import Crops
from ferkd_data.errors import UsageError

Interpolation: TypeAlias = Literal["bilinear", "bicubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("bilinear", "bicubic")

# The same kernels as torch.ops.aten's, begun 2 us sooner.
_RESIZE_INTO: dict[str, Any] = {
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,
}


def empty_batch(num_crops: int, size: int, *, shared: bool = False) -> Tensor:
    """An uninitialised uint8 batch (N, 3, S, S) in the memory format the cutter writes fastest (channels last)."""
    flat = num_crops * size * size * 3
    if shared:
        storage = torch.UntypedStorage._new_shared(flat, device="cpu")  # type: ignore[no-untyped-call]
        pixels = torch.empty(0, dtype=torch.uint8).set_(storage)
    else:
        pixels = torch.empty(flat, dtype=torch.uint8)
    return pixels.view(num_crops, size, size, 3).permute(0, 3, 1, 2)


def replay(
    image_HWC: npt.NDArray[np.uint8],
    crops: Crops,
    *,
    size: int,
    interpolation: Interpolation = "bilinear",
    out: Tensor | None = None,
) -> Tensor:
    """Cut `crops` out of a decoded image: uint8 (N, 3, S, S), channels last.

    The resize works across, rounds, then works down. Bilinear equals Pillow's crop-then-resize within 1 grey level
    (1 value in 27 million differs by 2), bicubic equals Pillow's two passes in this order within 2 levels: see
    docs/decisions.md. `out`, when given, must come from `empty_batch` (or be a slice of one along its first axis)
    and is filled and returned.

    Raises UsageError when a box does not lie inside the image or `interpolation` is unknown.
    """
    _check(image_HWC.shape[0], image_HWC.shape[1], crops, interpolation)
    if out is None:
        out = empty_batch(len(crops), size)
    pixels = image_HWC if image_HWC.flags.writeable else image_HWC.copy()
    image_HWC_t = torch.from_numpy(pixels)
    row, column = image_HWC_t.stride(0), image_HWC_t.stride(1)
    resize_into = _RESIZE_INTO[interpolation]
    output_size = [size, size]
    # Flipped straight into the batch: a copy fewer, in memory that stays in the cache from crop to crop.
    unflipped = empty_batch(1, size) if crops.flip.any() else None
    for n, ((top, left, height, width), flip) in enumerate(zip(crops.boxes.tolist(), crops.flip.tolist(), strict=True)):
        # One view instead of two slices, which cost 3 us more.
        patch = image_HWC_t.as_strided((1, 3, height, width), (0, 1, row, column), top * row + left * column)
        slot = out[n : n + 1]
        if flip and unflipped is not None:
            resize_into(patch, output_size, False, None, None, out=unflipped)
            torch.ops.aten.flip.out(unflipped, [3], out=slot)
        else:
            resize_into(patch, output_size, False, None, None, out=slot)
    return out


def replay_on_device(
    image_CHW: Tensor,
    crops: Crops,
    boxes_N4: Tensor | None = None,
    flip_N: Tensor | None = None,
    *,
    size: int,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """The same crops cut on the image's own device: uint8 (N, 3, S, S), within 2 levels of `replay`.

    `boxes_N4` (int64) and `flip_N` are those of `crops` where they are on the device already.

    Both passes of the resize are matrix products over all crops at once, so the number of kernels does not depend
    on N. On CUDA they run in float16 with float32 sums, which holds 8-bit pixels exactly.

    Raises UsageError as `replay` does.
    """
    height, width = image_CHW.shape[1:]
    _check(height, width, crops, interpolation)
    device = image_CHW.device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    boxes = _upload(crops.boxes.astype(np.int64), device) if boxes_N4 is None else boxes_N4
    flip = _upload(crops.flip, device) if flip_N is None else flip_N
    top, left, box_h, box_w = boxes.unbind(1)

    across_NSW = filter_weights(
        left, box_w, extent=width, size=size, interpolation=interpolation, backwards=flip, dtype=dtype
    )
    down_NSH = filter_weights(top, box_h, extent=height, size=size, interpolation=interpolation, dtype=dtype)

    rows = image_CHW.to(dtype).reshape(3 * height, width)
    narrow = torch.matmul(rows, across_NSW.transpose(1, 2)).view(-1, 3, height, size)
    # Pillow rounds and clips between its passes, which bicubic's overshoot makes visible.
    narrow = narrow.round_().clamp_(0, 255)
    crops_NCSS = torch.matmul(down_NSH.unsqueeze(1), narrow)
    return crops_NCSS.round_().clamp_(0, 255).to(torch.uint8, memory_format=torch.channels_last)


def filter_weights(
    start: Tensor,
    length: Tensor,
    *,
    extent: int,
    size: int,
    interpolation: Interpolation,
    backwards: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Resampling weights (N, S, extent) along one axis: output o of crop n is the sum of weights[n, o] * pixels.

    Pillow's antialiased filters: a triangle, or the cubic with a = -0.5, stretched by the reduction and normalised
    over the pixels inside the crop. Crops that are `backwards` (N,) have their outputs in reverse. The passes over all
    N * S * extent weights are what cutting costs on a GPU, so everything that can be is done on smaller tensors.
    """
    length_N11 = length[:, None, None].to(torch.float32)
    scale = length_N11 / size
    stretch = scale.clamp(min=1.0)
    output_1S1 = torch.arange(size, device=start.device, dtype=torch.float32)[None, :, None]
    if backwards is not None:
        output_1S1 = torch.where(backwards[:, None, None], (size - 1) - output_1S1, output_1S1)
    pixel_N1E = torch.arange(extent, device=start.device, dtype=torch.float32)[None, None, :]
    pixel_N1E = pixel_N1E - start[:, None, None].to(torch.float32)
    centre_NS1 = (output_1S1 + 0.5) * scale / stretch
    distance = ((pixel_N1E + 0.5) / stretch - centre_NS1).abs_()
    weights = _triangle(distance) if interpolation == "bilinear" else _cubic(distance)
    weights *= (pixel_N1E >= 0) & (pixel_N1E < length_N11)
    share = weights.sum(dim=2, keepdim=True).reciprocal_()
    return torch.mul(weights, share, out=torch.empty_like(weights, dtype=dtype))


def _triangle(distance: Tensor) -> Tensor:
    return distance.neg_().add_(1.0).clamp_(min=0.0)


def _cubic(distance: Tensor, a: float = -0.5) -> Tensor:
    near = ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1.0
    far = ((distance - 5.0) * distance + 8.0) * distance * a - 4.0 * a
    return torch.where(distance < 1.0, near, torch.where(distance < 2.0, far, 0.0))


def _upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _check(height: int, width: int, crops: Crops, interpolation: str) -> None:
    if interpolation not in INTERPOLATIONS:
        raise UsageError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
    # Plain integers: for the few crops of an image that a loader cuts, NumPy's comparisons take ten times as long.
    for n, (top, left, box_h, box_w) in enumerate(crops.boxes.tolist()):
        if not (box_h > 0 and box_w > 0 and 0 <= top <= height - box_h and 0 <= left <= width - box_w):
            raise UsageError(
                f"crop {n} (top {top}, left {left}, height {box_h}, width {box_w}) does not lie inside "
                f"an image of {height} rows and {width} columns; is this the image that was labelled?"
            )
