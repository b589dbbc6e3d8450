from __future__ import annotations

import numpy as np
import pytest
import torch

from ferkd_data import normalization
from ferkd_data.errors import UsageError
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


def test_floats_are_told_apart_by_their_largest_value():
    images = torch.arange(2 * 3 * 4 * 5).remainder(256).to(torch.uint8).view(2, 3, 4, 5)
    expected = normalize(images)
    for floats, max_value in ((images / 255, 1), (images.float(), 255.0), (images.double(), 255)):
        torch.testing.assert_close(normalize(floats, max_value=max_value), expected)


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (torch.rand(2, 3, 4, 5), {}, r"these are torch\.float32\. Say max_value=1 for floats in 0\.\.1"),
        (torch.rand(2, 3, 4, 5).half() * 255, {}, r"these are torch\.float16\."),
        (torch.ones(2, 3, 4, 5, dtype=torch.int64), {}, r"uint8 images of 0\.\.255; these are torch\.int64"),
        (torch.ones(2, 3, 4, 5, dtype=torch.bool), {}, r"these are torch\.bool"),
        (np.zeros((2, 3, 4, 5), np.uint8), {}, "images must be a tensor, got ndarray"),
        (torch.zeros(2, 4, 5, 3, dtype=torch.uint8), {}, r"\(2, 4, 5, 3\); permute\(0, 3, 1, 2\)"),
        (torch.zeros(3, 4, 5, dtype=torch.uint8), {}, r"shape \(B, 3, H, W\), got \(3, 4, 5\)"),
        (torch.zeros(2, 1, 4, 5, dtype=torch.uint8), {}, r"got \(2, 1, 4, 5\)"),
        (torch.rand(2, 3, 4, 5), {"max_value": 0}, "max_value must be positive"),
        (None, {"max_value": 1}, "uint8 images have a max_value of 255, got 1"),
        (np.zeros((2, 3, 4, 5)), {"max_value": 1}, "images must be a tensor, got ndarray"),
        (None, {"mean": (123.675, 116.28, 103.53), "std": (58.4, 57.1, 57.4)}, r"scaled to 0\.\.1, .*by 255"),
        (None, {"std": (0.0, 1, 1)}, r"scaled to 0\.\.1"),
        (None, {"mean": (0.5,)}, r"mean must be three numbers, one for each channel, got \(0\.5,\)"),
        (None, {"std": 0.5}, r"std must be three numbers"),
        (None, {"dtype": torch.uint8}, "floating-point dtype"),
    ],
)
def test_what_is_no_image_or_no_range(images, settings, message):
    images = torch.zeros(2, 3, 4, 5, dtype=torch.uint8) if images is None else images
    with pytest.raises(UsageError, match=message):
        normalize(images, **settings)
