"""uint8 batches to what a network wants, on the device they are on."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(
    images: Tensor,
    *,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(pixel / 255 - mean) / std of uint8 images (B, 3, H, W), in their memory format, as `dtype`.

    Computed in float32 and rounded to `dtype` once; on an accelerator in one kernel.
    """
    means = torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1)
    stds = torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
    scale = (1 / (255 * stds)).to(images.device, torch.float32, non_blocking=True)
    shift = (-means / stds).to(images.device, torch.float32, non_blocking=True)
    return scaled(images, scale, shift, dtype)


def scaled(images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """shift + pixel * scale of a uint8 batch, in its memory format; `scale` and `shift` are float32 (1, 3, 1, 1)."""
    if images.device.type == "cpu":
        return _on_cpu(images, scale, shift).to(dtype)
    return _in_one_kernel(images, scale, shift, dtype)


def _in_one_kernel(images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.addcmul(shift, images, scale, out=torch.empty_like(images, dtype=dtype))


def _on_cpu(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Operands that broadcast along an inner axis of 3 are not vectorised on a CPU; rows of W * 3 numbers are."""
    floats = images.to(torch.float32, copy=True)
    if not floats.is_contiguous(memory_format=torch.channels_last):
        return floats.mul_(scale).add_(shift)
    width = images.shape[3]
    rows = floats.permute(0, 2, 3, 1).flatten(start_dim=2)
    rows.mul_(scale.flatten().repeat(width)).add_(shift.flatten().repeat(width))
    return floats
