"""The screen never lets a bad row pass, and stops few good ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import ferkd_data as fd
from ferkd_data.errors import ImageError
from ferkd_data.exchange import checks
from ferkd_data.labels.buckets import Thresholds, assign_buckets, confidence
from ferkd_data.labels.checks import suspects
from ferkd_data.labels.rows import ShardLabels

R, N, K = 6, 4, 3
ODD_PROBS = np.array(
    [0, -0.0, 2**-24, 0.25, 0.5, 1, 1.0009765625, -0.25, np.nan, -np.nan, np.inf, -np.inf, 65504], np.float16
)
ODD_VALUES = {
    "height": [0, 1, 65535],
    "width": [0, 1, 65535],
    "target": [-1, 0, 3, 9, 10, -7, 65535, 65536, 2**31 - 1],
    "boxes": [0, 1, 400, 65535],
    "class_index": [0, 3, 9, 10, 65535],
    "class_prob": ODD_PROBS,
    "target_prob": ODD_PROBS,
    "bucket": [0, 1, 2, 3, 4, 255],
}


def good_labels(generator, num_classes, thresholds, *, wide=False):
    index = np.argsort(generator.random((R, N, num_classes if num_classes < 99 else 10)), axis=2)[:, :, :K]
    prob = generator.choice([0.5, 0.25, 0.125, 0.0625, 0.3, 0.1], (R, N, K)).astype(np.float16)
    prob /= np.maximum(1, prob.sum(axis=2, keepdims=True)).astype(np.float16)
    order = np.lexsort((index, -prob.astype(np.float32)), axis=2)
    index, prob = np.take_along_axis(index, order, 2), np.take_along_axis(prob, order, 2)
    target = generator.integers(-1, 10, R).astype(np.int32)
    hit = index == target[:, None, None]
    said = np.where(hit.any(axis=2), np.where(hit, prob, 0).sum(axis=2), prob[:, :, -1] / 2).astype(np.float16)
    said[target == -1] = np.nan
    return ShardLabels(
        keys=[f"class/{row}" for row in range(R)],
        image_digest=np.zeros((R, 16), np.uint8),
        height=np.full(R, 400, np.uint16),
        width=np.full(R, 500, np.uint16),
        target=target,
        boxes=generator.integers(1, 200, (R, N, 4)).astype(np.uint16),
        flip=generator.random((R, N)) < 0.5,
        class_index=index.astype(np.uint32 if wide else np.uint16),
        class_prob=prob,
        target_prob=said,
        bucket=assign_buckets(confidence(prob, said, thresholds.confidence), thresholds),
    )


def damaged(generator, labels):
    """Some values replaced by odd ones."""
    for _ in range(int(generator.integers(0, 4))):
        name = str(generator.choice(list(ODD_VALUES)))
        array = getattr(labels, name).copy()
        at = tuple(generator.integers(0, array.shape))
        array[at] = np.asarray(generator.choice(ODD_VALUES[name])).astype(array.dtype)
        labels = replace(labels, **{name: array})
    return labels


def faults(labels, num_classes, thresholds):
    limits = {"pixel_limit": 10**8, "limit": 4}
    return list(checks.row_faults(labels, num_classes=num_classes, thresholds=thresholds, **limits))


@pytest.mark.parametrize("num_classes", [10, 65536, 70000])
@pytest.mark.parametrize("which", ["max", "target"])
def test_what_is_found_is_found_without_the_screen_too(num_classes, which, monkeypatch):
    generator = np.random.default_rng(num_classes)
    found = 0
    for _ in range(250):
        low, mid, top = np.sort(generator.choice([0, 0.125, 0.15, 0.25, 0.3, 0.5, 0.95, 1], 3)).tolist()
        thresholds = Thresholds(low=low, mid=mid, top=top, confidence=which)
        whole = good_labels(generator, num_classes, thresholds, wide=num_classes > 65536)
        assert not faults(whole, num_classes, thresholds)
        labels = damaged(generator, whole)
        screened = faults(labels, num_classes, thresholds)
        with monkeypatch.context() as patch:
            patch.setattr(checks, "suspects", lambda labels, **_: np.ones(len(labels), np.bool_))
            assert list(map(str, screened)) == list(map(str, faults(labels, num_classes, thresholds)))
        found += len(screened)
    assert found > 100


@pytest.mark.parametrize("layout", ["label_set", "tar_label_set"])
def test_good_rows_pass(layout, request):
    labels = fd.open_labels(request.getfixturevalue(layout))
    stored = labels.manifest.thresholds
    thresholds = Thresholds(low=stored.low, mid=stored.mid, top=stored.top, confidence=stored.confidence)
    for shard in labels.shards():
        assert not suspects(shard, num_classes=10, thresholds=thresholds).any()


def test_a_row_is_found_wherever_it_lies(monkeypatch):
    monkeypatch.setattr("ferkd_data.labels.checks.CROPS_AT_ONCE", 2 * N)
    thresholds = Thresholds()
    labels = good_labels(np.random.default_rng(0), 10, thresholds)
    for row in range(R):
        bucket = labels.bucket.copy()
        bucket[row, N - 1] = 9
        assert np.flatnonzero(
            suspects(replace(labels, bucket=bucket), num_classes=10, thresholds=thresholds)
        ).tolist() == [row]


KEYS = ["a", "a/b", "ü/b", "a.b/c", "a.b", "a//b", "/a", "a/", "../a", "a/__b__", "a__b", "a\nb", "a\\b", "a\x85b"]
KEYS += ["", "-", "a b", "x" * 1024, "x" * 1025, "ü" * 513, "😀" * 256, "a/./b", "\udc80", "a\n", "\n"]


def test_keys_are_judged_one_by_one_as_together():
    for number in range(len(KEYS)):
        keys = ["good", KEYS[number], "fine/too"]
        expected = []
        for row, key in enumerate(keys):
            try:
                checks.check_key(key)
            except ImageError as error:
                expected.append((row, error.detail))
        assert [(fault.row, fault.message) for fault in checks._key_faults(keys)] == expected, keys
