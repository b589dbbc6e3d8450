"""Normalise uint8 batches for a network, on their device, in as few passes over memory as possible."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ferkd_data.errors import UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(
    images: Tensor,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
    max_value: float | None = None,
) -> Tensor:
    """Compute (pixel / max_value - mean) / std of RGB images (B, 3, H, W), in their memory format, as `dtype`.

    uint8 images, which loaders give, have a `max_value` of 255. For float images it has to be given, 1 or 255: a
    network learns badly from pixels in the wrong range, and nothing else shows it. `mean` and `std` are three numbers
    each, in units of pixels scaled to 0..1, whatever `max_value` is; the defaults are ImageNet's.

    The result is computed in float32 and rounded to `dtype` once; on an accelerator, in one kernel. Raises UsageError
    for other shapes and dtypes, and for statistics outside 0..1.

    >>> import torch
    >>> images = torch.full((2, 3, 224, 224), 255, dtype=torch.uint8)
    >>> fd.normalize(images, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).amax().item()
    1.0
    """
    if not isinstance(images, Tensor):
        raise UsageError(f"images must be a tensor, got {type(images).__name__}")
    if max_value is None:
        max_value = 255.0
        _check_pixels(images)
    elif not 0 < max_value < math.inf:
        raise UsageError(f"max_value must be positive and finite, got {max_value}")
    elif images.dtype == torch.uint8 and max_value != 255:
        raise UsageError(f"uint8 images have a max_value of 255, got {max_value}; max_value is for float images")
    _check_shape(images)
    _check_statistics(mean, std)
    if not dtype.is_floating_point:
        raise UsageError(f"normalised images need a floating-point dtype, got {dtype}")
    # Folded into one multiply-add: (p / m - mean) / std = p / (m std) + (-mean / std).
    # In float64, so that each constant is rounded to float32 once.
    means = torch.tensor(mean, dtype=torch.float64, device="cpu").view(1, 3, 1, 1)
    stds = torch.tensor(std, dtype=torch.float64, device="cpu").view(1, 3, 1, 1)
    scale = (1 / (max_value * stds)).to(images.device, torch.float32, non_blocking=True)
    shift = (-means / stds).to(images.device, torch.float32, non_blocking=True)
    return scaled(images, scale, shift, dtype)


def _check_pixels(images: Tensor) -> None:
    """Raise UsageError for images whose dtype does not tell the range of the pixels."""
    if images.is_floating_point():
        raise UsageError(
            f"normalize takes uint8 images; these are {images.dtype}. Say max_value=1 for floats in 0..1, "
            "max_value=255 for floats in 0..255; images that are already normalised must not be normalised again"
        )
    if images.dtype != torch.uint8:
        raise UsageError(f"normalize takes uint8 images of 0..255; these are {images.dtype}")


def _check_shape(images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        hint = "; permute(0, 3, 1, 2) brings the channels to the front" if images.shape[-1:] == (3,) else ""
        raise UsageError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}{hint}")


def _check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if not (isinstance(values, Sequence) and len(values) == 3):
            raise UsageError(f"{name} must be three numbers, one for each channel, got {values!r}")
    if not (all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)):
        raise UsageError(
            f"mean and std are in units of pixels scaled to 0..1, got mean={mean} and std={std}; divide those of "
            "pixels in 0..255 by 255"
        )


def scaled(images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute shift + pixel * scale in the batch's memory format; `scale` and `shift` are float32 (1, 3, 1, 1)."""
    if images.device.type == "cpu":
        return _on_cpu(images, scale, shift).to(dtype)
    return _in_one_kernel(images, scale, shift, dtype)


def _in_one_kernel(images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    # `empty_like` keeps the memory format; uint8 pixels are converted within the kernel, without a copy in float32.
    return torch.addcmul(shift, images, scale, out=torch.empty_like(images, dtype=dtype))


def _on_cpu(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute on a CPU, with rows of W * 3 numbers for channels-last images.

    PyTorch does not vectorise operands that broadcast along an inner axis of 3.
    """
    # A copy also of float32 images: the steps below write in place.
    floats = images.to(torch.float32, copy=True)
    if not floats.is_contiguous(memory_format=torch.channels_last):
        return floats.mul_(scale).add_(shift)
    width = images.shape[3]
    # A view, (B, H, W * 3): channels-last memory lies in this order. Row by row, the three numbers repeat W times.
    rows = floats.permute(0, 2, 3, 1).flatten(start_dim=2)
    rows.mul_(scale.flatten().repeat(width)).add_(shift.flatten().repeat(width))
    return floats
