"""Replay: cut stored crops out of an image again. The builder and the loader use this one cutter.

A crop is cut, resized with an antialiased filter (as in Pillow, its support grows with the reduction), and then flipped
where it says so. `replay` works on the CPU, in `one_thread` where others want the cores too; `replay_on_device`
computes the same filters as matrix products.

Legend: N crops, S output side, H and W the image's sides. Pixels are uint8 RGB.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.augment import Operations, apply_operations
from ferkd_data.crops import Crops
from ferkd_data.errors import UsageError
from ferkd_data.upload import upload

Interpolation: TypeAlias = Literal["bilinear", "bicubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("bilinear", "bicubic")
FLOATS = {"cuda": torch.float16}
"""Dtype of the matrix products on devices where float32 is slower."""
CUT_BYTES = 2**30
"""Memory for cutting on a device, approximately; crops of huge images are cut in several steps."""
RADIUS: dict[Interpolation, float] = {"bilinear": 1.0, "bicubic": 2.0}
"""Radius of each filter in pixels of the smaller image."""

# The kernels of torch.ops.aten, without 2 us of dispatch for each call.
_RESIZE_INTO: dict[str, Any] = {
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,
}


def empty_batch(num_crops: int, size: int, *, shared: bool = False) -> Tensor:
    """Allocate an uninitialised uint8 batch (N, 3, S, S), channels last, which the cutter writes fastest.

    `shared` puts it into shared memory, for another process to read.
    """
    flat = num_crops * size * size * 3
    if shared:
        storage = torch.UntypedStorage._new_shared(flat, device="cpu")  # type: ignore[no-untyped-call]
        pixels = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
    else:
        pixels = torch.empty(flat, dtype=torch.uint8, device="cpu")
    return pixels.view(num_crops, size, size, 3).permute(0, 3, 1, 2)


def replay(
    image_HWC: npt.NDArray[np.uint8],
    crops: Crops,
    *,
    size: int,
    interpolation: Interpolation = "bilinear",
    out: Tensor | None = None,
) -> Tensor:
    """Cut `crops` out of a decoded image (H, W, 3): uint8 (N, 3, S, S), channels last.

    The resize works across, rounds, then works down. Bilinear equals Pillow's crop-then-resize within 1 grey level
    (1 value in 27 million differs by 2). Bicubic equals Pillow's two passes in this order within 2 levels. See
    docs/decisions.md. `out`, if given, comes from `empty_batch`, or is a slice of such a batch along its first axis; it
    is filled and returned.

    Raises UsageError where a box does not lie inside the image, and for an unknown interpolation.
    """
    # Before anything is cut: `as_strided` below takes any offset, and would read other rows in silence.
    _check(image_HWC.shape[0], image_HWC.shape[1], crops, interpolation)
    if out is None:
        out = empty_batch(len(crops), size)
    pixels = image_HWC if image_HWC.flags.writeable else image_HWC.copy()
    image_HWC_t = torch.from_numpy(pixels)
    row, column = image_HWC_t.stride(0), image_HWC_t.stride(1)
    resize_into = _RESIZE_INTO[interpolation]
    output_size = [size, size]
    # A flipped crop is resized into this one buffer, which stays in the cache, and flipped into the batch: a copy less.
    unflipped = empty_batch(1, size) if crops.flip.any() else None
    for n, ((top, left, height, width), flip) in enumerate(zip(crops.boxes.tolist(), crops.flip.tolist(), strict=True)):
        # One strided tensor in place of two slices, which cost 3 us more.
        patch = image_HWC_t.as_strided((1, 3, height, width), (0, 1, row, column), top * row + left * column)
        slot = out[n : n + 1]
        if flip and unflipped is not None:
            resize_into(patch, output_size, False, None, None, out=unflipped)
            torch.ops.aten.flip.out(unflipped, [3], out=slot)
        else:
            resize_into(patch, output_size, False, None, None, out=slot)
    _augment(out, [crops])
    return out


def replay_on_device(
    images_CHW: Sequence[Tensor],
    crops: Sequence[Crops],
    boxes_N4: Tensor | None = None,
    flip_N: Tensor | None = None,
    *,
    size: int,
    interpolation: Interpolation = "bilinear",
    budget: int = CUT_BYTES,
) -> Tensor:
    """Cut crops on the device of their images: uint8 (N, 3, S, S), channels last, within 2 levels of `replay`.

    The output is in the order of the images, then of their crops. `boxes_N4` (int64) and `flip_N` are those of `crops`,
    if the device already has them. `budget` is the memory for intermediates in bytes, approximately.

    Both passes of the resize are matrix products over all crops of an image at once: a dozen kernels for each image,
    whatever the number of its crops. On CUDA they run in float16, which holds 8-bit pixels exactly; in which precision
    their sums are kept is up to PyTorch's settings (`torch.backends.cuda.matmul`), so results are clipped to 0..255.
    Autocast changes nothing. The host does not wait for the device, nor do recorded operations make it wait.

    Raises UsageError as `replay` does.
    """
    for image_CHW, drawn in zip(images_CHW, crops, strict=True):
        _check(image_CHW.shape[1], image_CHW.shape[2], drawn, interpolation)
    device = images_CHW[0].device
    drawn_N4 = np.concatenate([drawn.boxes for drawn in crops])
    boxes = upload(drawn_N4.astype(np.int64), device) if boxes_N4 is None else boxes_N4
    flip = upload(np.concatenate([drawn.flip for drawn in crops]), device) if flip_N is None else flip_N
    out_NSSC = torch.empty((len(drawn_N4), size, size, 3), dtype=torch.uint8, device=device)
    shapes = [(image.shape[1], image.shape[2]) for image in images_CHW]
    row = 0
    # A loop may iterate over its loader under autocast, which would compute levels in half precision.
    with torch.autocast(device.type, enabled=False):
        for step in cutting_steps(shapes, [len(drawn) for drawn in crops], size, interpolation, budget):
            rows = slice(row, row + sum(count for _, count in step))
            taps = num_taps(int(drawn_N4[rows, 2:].max()), size, interpolation)
            filters = filter_taps(boxes[rows], flip[rows], taps=taps, size=size, interpolation=interpolation)
            _cut_step([(images_CHW[image], count) for image, count in step], *filters, out_NSSC[rows])
            row = rows.stop
        out = out_NSSC.permute(0, 3, 1, 2)
        _augment(out, crops)
    return out


def _cut_step(images: Sequence[tuple[Tensor, int]], pixel_2NST: Tensor, weight_2NST: Tensor, out_NSSC: Tensor) -> None:
    """Cut the crops of a step, for each image as many as stand beside it, into `out_NSSC`."""
    weight_2NST = weight_2NST.to(FLOATS.get(out_NSSC.device.type, torch.float32))
    row = 0
    for image_CHW, count in images:
        rows = slice(row, row + count)
        out_NSSC[rows] = _resized(image_CHW, pixel_2NST[:, rows], weight_2NST[:, rows])
        row += count


def _augment(images_NCSS: Tensor, crops: Sequence[Crops]) -> None:
    """Replay the recorded operations in place; the result is exact on every device."""
    words = [part.operations for part in crops if part.operations is not None and part.operations.size]
    if words:
        apply_operations(images_NCSS, Operations.unpack(np.concatenate(words)))


def cutting_steps(
    shapes: Sequence[tuple[int, int]], counts: Sequence[int], size: int, interpolation: Interpolation, budget: int
) -> Iterator[list[tuple[int, int]]]:
    """Split the crops into steps whose intermediates take about `budget` bytes.

    Yields each step as a list of (image number, number of crops), in order. A step holds at least one crop.
    """
    step: list[tuple[int, int]] = []
    widest = products = num = 0
    for image, ((height, width), left) in enumerate(zip(shapes, counts, strict=True)):
        # Bytes of each crop: float32 weights and int64 pixel numbers for as many taps as the widest crop of the step
        # has; and float16 matrices.
        widest_here = 64 * num_taps(max(height, width), size, interpolation) * size
        product = (4 * width + 10 * height + 9 * size) * size
        while left:
            widest = max(widest, widest_here)
            room = (budget - products - num * widest) // (product + widest)
            if room < 1 and step:
                yield step
                step, widest, products, num = [], 0, 0, 0
                continue
            count = min(left, max(1, room))
            step.append((image, count))
            left, products, num = left - count, products + count * product, num + count
    if step:
        yield step


def _resized(image_CHW: Tensor, pixel_2NST: Tensor, weight_2NST: Tensor) -> Tensor:
    """Cut and resize the crops of one image: float (N, S, S, 3) with integer values in 0..255.

    The filters of its N crops are as `filter_taps` returns them, with weights in the dtype of the matrix products.
    """
    (down, across), (down_weight, across_weight) = pixel_2NST, weight_2NST
    num, size, taps = down.shape
    # Padding without weight on the right and below: room for all taps, and rows whose length suits tensor cores.
    height, width = image_CHW.shape[1:]
    padded_h, padded_w = _multiple_of_8(height + taps), _multiple_of_8(width + taps)
    rows_CHW = across_weight.new_zeros((3, padded_h, padded_w))
    rows_CHW[:, :height, :width] = image_CHW
    across_NSW = across_weight.new_zeros((num, size, padded_w)).scatter_(2, across, across_weight)
    down_NSH = down_weight.new_zeros((num, size, padded_h)).scatter_(2, down, down_weight)
    # The order columns, channels, rows: neither product needs a transposed copy, and the batch is channels last.
    narrow = torch.mm(across_NSW.view(-1, padded_w), rows_CHW.view(-1, padded_w).t())
    # Pillow rounds and clips between its passes; without that, bicubic's overshoot would show.
    narrow = _levels(narrow).view(num, size * 3, padded_h)
    return _levels(torch.bmm(down_NSH, narrow.transpose(1, 2))).view(num, size, size, 3)


def _levels(values: Tensor) -> Tensor:
    """Round to levels in place, and clip them to 0..255."""
    # Bilinear results too: where sums are kept in less than float32, white reaches 256, which is 0 in uint8.
    return values.round_().clamp_(0, 255)


def filter_taps(
    boxes_N4: Tensor, flip_N: Tensor, *, taps: int, size: int, interpolation: Interpolation
) -> tuple[Tensor, Tensor]:
    """Compute the pixels that make each row and column of a crop, and their weights: (2, N, S, taps), down then across.

    The filters are Pillow's antialiased ones: a triangle, or the cubic with a = -0.5, stretched by the reduction and
    normalised over the pixels inside the crop. A flipped crop has its columns in reverse. Only pixels within reach of
    the filter are listed: weights of all pixels would cost more than the cutting itself on a GPU. Pixels listed behind
    the end of a crop have weight 0.
    """
    corner_4N11 = boxes_N4.t()[:, :, None, None]
    start_2N11, length_2N11 = corner_4N11[:2], corner_4N11[2:]
    length_2N11 = length_2N11.to(torch.float32)
    scale = length_2N11 / size
    stretch = scale.clamp(min=1.0)
    output_S1 = torch.arange(size, device=boxes_N4.device, dtype=torch.float32)[:, None]
    backwards_2N11 = torch.stack([torch.zeros_like(flip_N), flip_N])[:, :, None, None]
    output = torch.where(backwards_2N11, (size - 1) - output_S1, output_S1)
    # Pixel i covers i .. i + 1, so its centre is at i + 0.5, in the output as in the crop.
    centre_2NS1 = (output + 0.5) * scale
    first_2NS1 = (centre_2NS1 - RADIUS[interpolation] * stretch).floor_().clamp_(min=0.0)
    pixel_2NST = first_2NS1 + torch.arange(taps, device=boxes_N4.device, dtype=torch.float32)
    distance = ((pixel_2NST + 0.5 - centre_2NS1) / stretch).abs_()
    weights = _triangle(distance) if interpolation == "bilinear" else _cubic(distance)
    weights *= pixel_2NST < length_2N11
    weights /= weights.sum(dim=3, keepdim=True)
    return pixel_2NST.to(torch.int64).add_(start_2N11), weights


def num_taps(length: int, size: int, interpolation: Interpolation) -> int:
    """Count the consecutive pixels that a filter can reach in a crop with a side of `length`, resized to `size`."""
    return int(2 * RADIUS[interpolation] * max(1.0, length / size) + 1.5) + 1


def _multiple_of_8(length: int) -> int:
    return -(-length // 8) * 8


def _triangle(distance: Tensor) -> Tensor:
    return distance.neg_().add_(1.0).clamp_(min=0.0)


def _cubic(distance: Tensor, a: float = -0.5) -> Tensor:
    """Evaluate Keys' cubic convolution kernel: one polynomial below distance 1, one from 1 to 2, 0 beyond."""
    near = ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1.0
    far = ((distance - 5.0) * distance + 8.0) * distance * a - 4.0 * a
    return torch.where(distance < 1.0, near, torch.where(distance < 2.0, far, 0.0))


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


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's kernels in the calling thread alone; other threads of the process keep their settings.

    PyTorch shares even the kernel of one crop among all its compute threads, which then busily wait for each other:
    where other processes want the cores too, 27 times the CPU time of one thread was measured.

    `torch.set_num_threads` would change all threads, so this sets OpenMP's number for the calling one. Where PyTorch
    was built without OpenMP, nothing changes.
    """
    before = torch.get_num_threads()
    set_threads = _omp_set_num_threads() if before > 1 else None
    if set_threads is None:
        yield
        return
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


@functools.cache
def _omp_set_num_threads() -> Callable[[int], None] | None:
    """Find OpenMP's function that sets the calling thread's number of threads, in the library that PyTorch loaded."""
    try:
        # The loader looks for a symbol in this library and in all that it needs.
        found = ctypes.CDLL(torch._C.__file__).omp_set_num_threads
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_int], None
    before = torch.get_num_threads()
    found(1)
    # PyTorch asks OpenMP for this number. Where it does not follow, the symbol is of another library than PyTorch's.
    works = torch.get_num_threads() == 1
    found(before)
    return found if works else None
