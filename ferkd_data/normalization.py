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

    Computed in float32, in one kernel, and rounded to `dtype` once.
    """
    means = torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1)
    stds = torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
    scale = (1 / (255 * stds)).to(images.device, torch.float32, non_blocking=True)
    shift = (-means / stds).to(images.device, torch.float32, non_blocking=True)
    return torch.addcmul(shift, images, scale, out=torch.empty_like(images, dtype=dtype))
