from __future__ import annotations

import pytest
import torch

from ferkd_data import normalization
from ferkd_data.normalization import IMAGENET_MEAN, IMAGENET_STD, normalize


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["cpu", "accelerator"])
def test_every_level_is_rounded_once(dtype, memory_format, way, monkeypatch):
    if way == "accelerator":
        monkeypatch.setattr(normalization, "_on_cpu", lambda *args: normalization._in_one_kernel(*args, dtype=dtype))
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    ours = normalize(levels.contiguous(memory_format=memory_format), dtype=dtype)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    exact = (levels.double() / 255 - mean) / std
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=memory_format)
    assert (ours.double() - exact).abs().max() <= (exact.to(dtype).double() - exact).abs().max() + 1e-6


def test_images_stay_as_they_are_and_any_strides_will_do():
    images = torch.arange(2 * 3 * 8 * 10).remainder(256).to(torch.uint8).view(2, 3, 8, 10)
    before = images.clone()
    for view in (images[:, :, ::2, 1:], images.contiguous(memory_format=torch.channels_last)[:, :, 2:5], images[:0]):
        torch.testing.assert_close(normalize(view), normalize(view.contiguous()))
    assert torch.equal(images, before)
