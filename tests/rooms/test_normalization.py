from __future__ import annotations

import pytest
import torch

from ferkd_data.normalization import IMAGENET_MEAN, IMAGENET_STD, normalize


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_level_is_rounded_once(dtype, memory_format):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    ours = normalize(levels.contiguous(memory_format=memory_format), dtype=dtype)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    exact = (levels.double() / 255 - mean) / std
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=memory_format)
    assert (ours.double() - exact).abs().max() <= (exact.to(dtype).double() - exact).abs().max() + 1e-6
