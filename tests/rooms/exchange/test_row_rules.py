"""The rules for rows, in their fast form, against the same rules in plain Python."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

import ferkd_data as fd
from ferkd_data.errors import ImageError, ShardError
from ferkd_data.exchange import checks
from ferkd_data.labels.buckets import Thresholds, assign_buckets, confidences_of
from ferkd_data.labels.checks import agreement_rules, broken_rows, check_rows, refusing_rules
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
        bucket=assign_buckets(confidences_of(prob, said, thresholds.confidence), thresholds),
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


def expected(labels, num_classes, thresholds):
    """The rules, one value after the other in plain Python: (row, crop, field, words)."""
    for row, crop in np.ndindex(len(labels), labels.num_crops):
        for field, words in crop_faults(labels[row], crop, num_classes, thresholds):
            yield row, crop, field, words


def crop_faults(image, crop, num_classes, thresholds):
    top, left, height, width = image.boxes[crop].tolist()
    if height == 0 or width == 0:
        yield "boxes", "is empty"
    if top + height > image.height or left + width > image.width:
        yield "boxes", "is not inside"
    index, prob = image.class_index[crop].tolist(), image.class_prob[crop].tolist()
    said, bucket, target = float(image.target_prob[crop]), int(image.bucket[crop]), image.target
    if max(index) >= num_classes:
        yield "class_index", "classes are"
    if len(set(index)) < len(index):
        yield "class_index", "names a class twice"
    pairs = list(itertools.pairwise(prob))
    finite, possible = all(map(math.isfinite, prob)), all(0 <= p <= 1 for p in prob)
    if not finite:
        yield "class_prob", "is not finite"
    if any(math.isfinite(p) and not 0 <= p <= 1 for p in prob):
        yield "class_prob", "is not in 0..1"
    if possible and prob[0] == 0:
        yield "class_prob", "no class has"
    if possible and any(b > a for a, b in pairs):
        yield "class_prob", "is not descending"
    if possible and math.fsum(prob) > 1 + 2**-10:
        yield "class_prob", "sums to more"
    if any(a == b and i > j for (a, b), i, j in zip(pairs, index, index[1:], strict=False)):
        yield "class_index", "equal probabilities"
    if not math.isnan(said) and not 0 <= said <= 1:
        yield "target_prob", "is not in 0..1"
    if target == -1 and not math.isnan(said):
        yield "target_prob", "is unknown"
    if 0 <= target < num_classes:
        kept = [p for i, p in zip(index, prob, strict=True) if i == target]
        if kept and math.isnan(said):
            yield "target_prob", "is null"
        if any(p != said for p in kept) and not math.isnan(said):
            yield "target_prob", "is not the probability"
        if not kept and 0 <= said <= 1 and 0 <= prob[-1] <= 1 and said > prob[-1]:
            yield "target_prob", "is more than the least"
    sure = prob[0] if thresholds.confidence == "max" or math.isnan(said) else said
    edges = thresholds.low, thresholds.mid, thresholds.top
    if bucket > 3 or (0 <= sure <= 1 and bucket != sum(sure >= edge for edge in edges)):
        yield "bucket", "is not what"


@pytest.mark.parametrize("num_classes", [10, 65536, 70000])
@pytest.mark.parametrize("which", ["max", "target"])
def test_the_rules_find_what_plain_python_finds(num_classes, which):
    generator = np.random.default_rng(num_classes)
    found = refused = 0
    for _ in range(150):
        low, mid, top = np.sort(generator.choice([0, 0.125, 0.15, 0.25, 0.3, 0.5, 0.95, 1], 3)).tolist()
        thresholds = Thresholds(low=low, mid=mid, top=top, confidence=which)
        whole = good_labels(generator, num_classes, thresholds, wide=num_classes > 65536)
        assert not faults(whole, num_classes, thresholds)
        check_rows("x", whole, num_classes)
        labels = damaged(generator, whole)
        of_crops = [fault for fault in faults(labels, num_classes, thresholds) if fault.crop is not None]
        wanted = list(expected(labels, num_classes, thresholds))
        # The first crop of a row that breaks a rule is named, and the others are counted.
        firsts = {(row, field, words): crop for row, crop, field, words in reversed(wanted)}
        for (row, field, words), crop in firsts.items():
            named = [f for f in of_crops if (f.row, f.crop, f.field) == (row, crop, field) and words in f.message]
            assert named, (row, crop, field, words, of_crops)
        assert {(f.row, f.field) for f in of_crops} == {(row, field) for row, field, _ in firsts}
        found += len(firsts)
        refused += is_refused(labels, num_classes)
    assert found > 100 and refused > 30


def is_refused(labels, num_classes):
    try:
        check_rows("x", labels, num_classes)
    except ShardError:
        return True
    return False


@pytest.mark.parametrize("layout", ["label_set", "tar_label_set"])
def test_good_rows_pass(layout, request):
    labels = fd.open_labels(request.getfixturevalue(layout))
    kinds = refusing_rules(10), agreement_rules(10, labels.manifest.thresholds.absolute())
    for shard in labels.shards():
        assert not len(broken_rows(shard, *kinds))


def test_a_row_is_found_wherever_it_lies(monkeypatch):
    monkeypatch.setattr("ferkd_data.labels.checks.CROPS_AT_ONCE", 2 * N)
    labels = good_labels(np.random.default_rng(0), 10, Thresholds())
    for row in range(R):
        bucket = labels.bucket.copy()
        bucket[row, N - 1] = 9
        assert broken_rows(replace(labels, bucket=bucket), refusing_rules(10)).tolist() == [row]


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
