"""Drawing operations: a pure function, stable under further crops, distributed as in the papers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferkd_data.augment.distribution import (
    AUGMENTATION_KINDS,
    RANDAUGMENT,
    Augmentation,
    draw_operations,
    parse_augmentations,
)
from ferkd_data.augment.operations import CODES, check_operations
from ferkd_data.errors import UsageError

TEXTS = [
    "randaugment:n=2,m=9", "trivialaugment", "colorjitter:0.4,0.4,0.4,0.1", "colorjitter:0.8,0,0.3,p=0.5", "rotate:15",
    "blur:sigma=0.1..2,p=0.3", "grayscale:p=0.2", "solarize:threshold=100,p=0.5", "equalize:p=0.1", "autocontrast",
    "invert:p=0.5", "erase:p=0.25",
]  # fmt: skip


def draw(texts, *, first=0, count=400, key="a", seed=0):
    return draw_operations(key, parse_augmentations(texts), seed=seed, first=first, count=count)


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_of_an_augmentation_reads_back(text):
    parsed = Augmentation.parse(text)
    assert Augmentation.parse(str(parsed)) == parsed


@pytest.mark.parametrize("kind", list(AUGMENTATION_KINDS))
def test_every_kind_draws_what_can_be_replayed(kind):
    operations = draw([kind])
    assert operations.codes.shape == (400, Augmentation.parse(kind).num_operations)
    check_operations(operations)


@given(st.lists(st.sampled_from(TEXTS[:-1]), min_size=1, max_size=3), st.integers(0, 50), st.integers(1, 50))
def test_more_crops_keep_the_first(texts, first, count):
    whole, part = draw(texts, count=120), draw(texts, first=first, count=count)
    assert np.array_equal(whole.codes[first : first + count], part.codes)
    assert np.array_equal(whole.values[first : first + count], part.values)


def test_one_more_augmentation_changes_none_before_it():
    fewer, more = draw(["randaugment", "rotate:15"]), draw(["randaugment", "rotate:15", "grayscale", "erase:p=1"])
    assert np.array_equal(more.codes[:, :3], fewer.codes) and np.array_equal(more.values[:, :3], fewer.values)
    assert not fewer.erase.any() and more.erase[:, 2].all()


def test_key_and_seed_decide():
    one = draw(["trivialaugment"])
    for other in (draw(["trivialaugment"], key="b"), draw(["trivialaugment"], seed=1)):
        assert not np.array_equal(one.values, other.values)


def test_randaugment_chooses_evenly_at_its_magnitude():
    operations = draw(["randaugment:n=1,m=9"], count=14_000)
    counts = np.bincount(operations.codes[:, 0], minlength=18)
    assert (counts[[0, *(CODES[entry.operation] for entry in RANDAUGMENT if entry)]] > 850).all()
    angles = operations.values[operations.codes == CODES["rotate"]]
    assert set(np.unique(angles).tolist()) == {-900, 900}
    factors = operations.values[operations.codes == CODES["brightness"]]
    assert set(np.unique(factors).tolist()) == {730, 1270}


def test_trivialaugment_covers_its_range():
    operations = draw(["trivialaugment"], count=14_000)
    angles = operations.values[operations.codes == CODES["rotate"]]
    assert angles.min() == -13500 and angles.max() == 13500 and len(np.unique(angles)) == 61


def test_colorjitter_draws_its_order_for_each_crop():
    operations = draw(["colorjitter:0.4,0.3,0,0.1,p=0.5"], count=8_000)
    there = operations.codes.any(axis=1)
    assert 0.47 < there.mean() < 0.53
    assert len({tuple(row) for row in operations.codes[there].tolist()}) == 24
    assert CODES["saturation"] not in operations.codes
    factors = operations.values[operations.codes == CODES["brightness"]] / 1000
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4


def test_erasing_as_often_and_as_large_as_asked():
    boxes = draw(["erase:p=0.25,scale=0.1..0.2"], count=20_000).erase.astype(np.float64) / 65536
    there = boxes[:, 2] > 0
    area = (boxes[:, 2] * boxes[:, 3])[there]
    assert 0.24 < there.mean() < 0.26 and 0.0999 < area.min() and area.max() < 0.2001
    assert (boxes[:, :2] + boxes[:, 2:] <= 1).all()


@pytest.mark.parametrize(
    "text, said",
    [
        ("randaug", "must be one of"),
        ("randaugment:n=0", "n must be in 1..16"),
        ("randaugment:m=31", "m must be in 0..30"),
        ("randaugment:n=1.5", "whole number"),
        ("rotate:fifteen", "must be a number"),
        ("rotate:1,2", "too many values"),
        ("rotate:degrees=1,degrees=2", "given twice"),
        ("colorjitter:p=0.5,0.4", "value 2 needs a name"),
        ("colorjitter:0.4,,0.4", "value 2 needs a name"),
        ("rotate:angle=2", "degrees .default 15., p"),
        ("erase:p=2", "p must be in 0..1"),
        ("erase:p=0.1..0.2", "one number"),
        ("blur:sigma=2..1", "sigma must be in"),
        ("trivialaugment:m=3", "has no options"),
        ("grayscale:p=nan", "p must be in"),
    ],
)
def test_what_cannot_be_right_is_an_error(text, said):
    with pytest.raises(UsageError, match=said):
        Augmentation.parse(text)


def test_erase_can_be_given_once():
    with pytest.raises(UsageError, match="once"):
        parse_augmentations(["erase", "rotate", "erase:p=0.5"])
