"""Invariant 1: a crop depends on (seed, key, crop number) alone."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from ferkd_data.crops import CropDistribution, draw_crops

SIDES = st.integers(1, 3000)
SEEDS = st.integers(0, 2**63)


def draw(key="a", height=375, width=500, seed=0, first=0, count=8, **changes):
    return draw_crops(key, height, width, seed=seed, first=first, count=count, distribution=CropDistribution(**changes))


@given(key=st.text(), height=SIDES, width=SIDES, seed=SEEDS, few=st.integers(1, 9), more=st.integers(0, 9))
def test_more_crops_later_keep_the_first_ones(key, height, width, seed, few, more):
    short = draw(key, height, width, seed, count=few)
    long = draw(key, height, width, seed, count=few + more)
    assert np.array_equal(short.boxes, long.boxes[:few])
    assert np.array_equal(short.flip, long.flip[:few])
    rest = draw(key, height, width, seed, first=few, count=more)
    assert np.array_equal(rest.boxes, long.boxes[few:])
    assert np.array_equal(rest.flip, long.flip[few:])


@given(height=st.integers(1, 65535), width=st.integers(1, 65535), seed=SEEDS)
def test_boxes_lie_inside_any_image(height, width, seed):
    top, left, box_h, box_w = draw("k", height, width, seed, count=20).boxes.astype(int).T
    assert (box_h >= 1).all() and (box_w >= 1).all()
    assert (top + box_h <= height).all() and (left + box_w <= width).all()


def test_seed_and_key_matter():
    reference = draw(count=50).boxes
    assert not np.array_equal(reference, draw(seed=1, count=50).boxes)
    assert not np.array_equal(reference, draw("b", count=50).boxes)
    assert not np.array_equal(reference[:25], reference[25:])


def test_known_values_never_change():
    """Published label sets depend on these."""
    crops = draw("n01440764/n01440764_10026", 375, 500, seed=7, count=3)
    assert crops.boxes.tolist() == KNOWN_BOXES
    assert crops.flip.tolist() == KNOWN_FLIPS


def test_the_distribution_is_torchvisions():
    """Centre, area and ratio, by their deciles, against torchvision on the same image size."""
    height, width, count = 300, 500, 40_000
    ours = draw("image", height, width, count=count).boxes.astype(float)
    torch.manual_seed(0)
    image = torch.empty((1, height, width))
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], dtype=float
    )
    for name, view in VIEWS.items():
        a, b = np.quantile(view(ours), DECILES), np.quantile(view(theirs), DECILES)
        spread = np.quantile(view(theirs), 0.95) - np.quantile(view(theirs), 0.05)
        assert np.abs(a - b).max() < 0.02 * spread, name
    assert abs(draw(count=count).flip.mean() - 0.5) < 0.01


@settings(max_examples=30)
@given(height=st.integers(1, 400), width=st.integers(1, 400))
def test_the_fallback_is_torchvisions(height, width):
    """A scale that no box of an allowed ratio can have forces the central crop."""
    params = RandomResizedCrop.get_params(torch.empty((1, height, width)), [1.0, 1.0], [5.0, 5.0])
    ours = draw("k", height, width, count=1, scale=(1.0, 1.0), ratio=(5.0, 5.0)).boxes[0]
    if width != 5 * height:
        assert np.abs(ours.astype(int) - np.array(params)).max() <= 1


DECILES = np.linspace(0.1, 0.9, 9)
VIEWS = {
    "centre row": lambda box: box[:, 0] + box[:, 2] / 2,
    "centre column": lambda box: box[:, 1] + box[:, 3] / 2,
    "area": lambda box: box[:, 2] * box[:, 3],
    "ratio": lambda box: np.log(box[:, 3] / box[:, 2]),
}
KNOWN_BOXES = [[0, 179, 375, 285], [0, 101, 354, 341], [1, 158, 252, 214]]
KNOWN_FLIPS = [False, False, True]
