"""The rules that rows of a label set keep, each written once, for readers and for `verify`.

A rule is a mask of the crops that break it. Where breaking it would poison a training in silence, every reader refuses
the row (`check_rows`); `verify` reports this, and where the columns of a row do not agree with each other.

All rules run on every row, so they are written for speed. Arrays are turned so that crops come last, (k, R, N), since
comparing along the crops is 20 times as fast as along the classes. Probabilities are compared as the bit patterns of
their float16, which are in the order of the values from 0 to 1. Rows come in slices that stay in a core's cache.

Legend: R images, N crops per image, k kept classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import ShardError
from ferkd_data.labels.buckets import BUCKETS, NUM_FLOAT16, Thresholds, from_patterns
from ferkd_data.labels.rows import UNKNOWN_TARGET, ShardLabels

BoolArray = npt.NDArray[np.bool_]
Patterns = npt.NDArray[np.uint16]

MAX_TOTAL = 1 + 2**-10
"""The largest sum of a crop's probabilities: rounding to float16 raises a sum of 1 by at most half of the excess."""
CLEAR_TOTAL = MAX_TOTAL - 2**-12
"""A float32 sum of up to 2,048 probabilities below this is at most MAX_TOTAL whatever the rounding."""
CROPS_AT_ONCE = 16384
"""Crops in a slice of rows: at top-5, their probabilities and classes take 320 KB, which a core's cache holds."""
INFINITY, NO_SIGN, MINUS_ZERO = 0x7C00, 0x7FFF, 0x8000
VALUES = np.arange(NUM_FLOAT16, dtype=np.uint16).view(np.float16).astype(np.float64)
"""The numbers from 0 to 1 that float16 has, by their patterns."""
WRONG_BUCKET = (
    "is not what the manifest's thresholds say ("
    + ", ".join(f"{code} {name}" for code, name in enumerate(BUCKETS))
    + ")"
)
DO_NOT_TRAIN = "do not train on this label set"
NAMES = {
    "class_prob": "the probabilities",
    "class_index": "the classes",
    "target_prob": "the target's probability",
    "bucket": "the bucket",
    "boxes": "the box",
}


class Rule(NamedTuple):
    """One rule, applied to some rows."""

    field: str
    broken: Any
    """(R, N) bools: crops that break the rule. For `image_rules` (R,)."""
    explain: str
    """The fault in words, for `verify`; `{value}` stands for the value of the field."""
    refusal: str = ""
    """The fault in words that follow the value, for readers, which refuse such a row; empty where they do not."""


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """The columns of some rows, turned for comparing."""

    boxes: npt.NDArray[np.uint16]
    """(4, R, N)"""
    height: npt.NDArray[np.uint16]
    """(R, 1), as `width` and `target`."""
    width: npt.NDArray[np.uint16]
    target: npt.NDArray[np.int32]
    index: npt.NDArray[Any]
    """(k, R, N)"""
    prob: Patterns
    """(k, R, N)"""
    target_prob: Patterns
    """(R, N), as `bucket`."""
    bucket: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, labels: ShardLabels, rows: slice) -> _Columns:
        return cls(
            boxes=_crops_last(labels.boxes[rows]),
            height=labels.height[rows][:, None],
            width=labels.width[rows][:, None],
            target=labels.target[rows][:, None],
            index=_crops_last(labels.class_index[rows]),
            prob=_patterns(_crops_last(labels.class_prob[rows])),
            target_prob=_patterns(np.ascontiguousarray(labels.target_prob[rows])),
            bucket=labels.bucket[rows],
        )


def _crops_last(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Copy an array (R, N, k) to (k, R, N), contiguous."""
    return np.ascontiguousarray(np.moveaxis(values, 2, 0))


def _patterns(values: npt.NDArray[np.float16]) -> Patterns:
    """Return the bit patterns of float16 values, with -0 turned into 0."""
    patterns = values.view(np.uint16)
    return np.where(patterns == MINUS_ZERO, np.uint16(0), patterns) if (patterns == MINUS_ZERO).any() else patterns


Rules = Callable[[_Columns], Iterator[Rule]]


def refusing_rules(num_classes: int) -> Rules:
    """Return the rules of one crop by itself: a crop that breaks one cannot be trained on."""

    def rules(c: _Columns) -> Iterator[Rule]:
        yield from _box_rules(c)
        largest = int(c.index.max(initial=0))
        refusal = f"hold class {largest} in a label set of {num_classes} classes"
        beyond = c.index.max(axis=0) >= num_classes
        yield Rule("class_index", beyond, f"{{value}}, classes are 0..{num_classes - 1}", refusal)
        # Each class against those 1, 2, … k - 1 positions on: all pairs, without sorting k classes of every crop.
        twice = np.zeros(beyond.shape, np.bool_)
        for apart in range(1, len(c.index)):
            twice |= (c.index[apart:] == c.index[:-apart]).any(axis=0)
        yield Rule("class_index", twice, "{value} names a class twice", "name a class twice")
        yield from _probability_rules(c)
        target_prob = c.target_prob
        outside = (target_prob >= NUM_FLOAT16) & ~_is_nan(target_prob)
        yield Rule("target_prob", outside, "{value} is not in 0..1", "is not in 0..1")
        unknown = f"is none of the {len(BUCKETS)} buckets"
        yield Rule("bucket", c.bucket >= len(BUCKETS), f"{{value}} {WRONG_BUCKET}", unknown)

    return rules


def _box_rules(c: _Columns) -> Iterator[Rule]:
    sides = "(top, left, height, width)"
    top, left, height, width = c.boxes
    empty = (height == 0) | (width == 0)
    yield Rule("boxes", empty, f"{{value}} {sides} is empty", f"{sides} is empty")
    # The numbers are unsigned: a difference wraps where top > height, and there the first comparison holds already.
    outside = (top > c.height) | (left > c.width) | (height > c.height - top) | (width > c.width - left)
    yield Rule("boxes", outside, f"{{value}} {sides} is not inside the image", f"{sides} is not inside its image")


def _probability_rules(c: _Columns) -> Iterator[Rule]:
    prob = c.prob
    odd = prob.max(axis=0) >= NUM_FLOAT16
    # Never in a sound label set, so that these masks cost nothing there.
    if odd.any():
        infinite = (prob & NO_SIGN) >= INFINITY
        yield Rule("class_prob", infinite.any(axis=0), "{value} is not finite", "are not all finite")
        negative = ((prob > MINUS_ZERO) & ~infinite).any(axis=0)
        yield Rule("class_prob", negative, "{value} is not in 0..1", "are negative")
        above = ((prob >= NUM_FLOAT16) & (prob < INFINITY)).any(axis=0)
        yield Rule("class_prob", above, "{value} is not in 0..1", "sum to more than 1")
    # Patterns of other numbers have another order, and their faults are named already.
    fine = ~odd
    yield Rule("class_prob", (prob[0] == 0) & fine, "{value}: no class has a probability", "are all 0")
    rising = (prob[1:] > prob[:-1]).any(axis=0) & fine
    yield Rule("class_prob", rising, "{value} is not descending", "are not descending")
    yield Rule("class_prob", _too_much(prob) & fine, "{value} sums to more than 1", "sum to more than 1")


def _too_much(prob: Patterns) -> BoolArray:
    """Mark the crops (R, N) whose probabilities sum to more than MAX_TOTAL, exactly."""
    above: BoolArray = from_patterns(prob).sum(axis=0) > CLEAR_TOTAL
    if above.any():
        # float64 adds float16 up without rounding.
        above[above] = prob[:, above].view(np.float16).astype(np.float64).sum(axis=0) > MAX_TOTAL
    return above


def agreement_rules(num_classes: int, thresholds: Thresholds) -> Rules:
    """Return the rules by which the columns of a crop agree with each other, with the target and the thresholds."""

    def rules(c: _Columns) -> Iterator[Rule]:
        tied = ((c.prob[1:] == c.prob[:-1]) & (c.index[1:] < c.index[:-1])).any(axis=0)
        yield Rule("class_index", tied, "{value}: equal probabilities are not in the order of their classes")
        yield from _target_rules(c, num_classes)
        confidence = c.prob[0]
        if thresholds.confidence == "target":
            confidence = np.where(_is_nan(c.target_prob), c.prob[0], c.target_prob)
        wrong = (c.bucket != _buckets(confidence, thresholds)) & (c.bucket < len(BUCKETS))
        yield Rule("bucket", wrong & (confidence < NUM_FLOAT16), f"{{value}} {WRONG_BUCKET}")

    return rules


def _target_rules(c: _Columns, num_classes: int) -> Iterator[Rule]:
    target_prob, absent = c.target_prob, _is_nan(c.target_prob)
    unknown = c.target == UNKNOWN_TARGET
    yield Rule("target_prob", unknown & ~absent, "{value}, though the ground truth is unknown")
    # A target that is no class may look like one when it is cut to the size of class_index.
    known = (c.target >= 0) & (c.target < num_classes)
    is_target = (c.index == c.target.astype(c.index.dtype)) & known
    kept = is_target.any(axis=0)
    # Labels imported from elsewhere do not know it where the ground truth was cut off.
    yield Rule("target_prob", kept & absent, "is null, though the ground truth is among the classes kept")
    other = (is_target & (c.prob != target_prob)).any(axis=0) & ~absent
    yield Rule("target_prob", other, "{value} is not the probability of this class in class_prob")
    above = known & ~kept & (target_prob > c.prob[-1]) & (target_prob < NUM_FLOAT16) & (c.prob[-1] < NUM_FLOAT16)
    yield Rule("target_prob", above, "{value} is more than the least probability that was kept")


def _is_nan(patterns: Patterns) -> BoolArray:
    found: BoolArray = (patterns & NO_SIGN) > INFINITY
    return found


def _buckets(confidence: Patterns, thresholds: Thresholds) -> npt.NDArray[np.uint8]:
    """Assign buckets as `buckets.assign_buckets` does, to patterns of 0..1."""
    # The pattern of the first value that reaches each threshold: confidence >= threshold becomes a test of integers.
    low, mid, top = np.searchsorted(VALUES, [thresholds.low, thresholds.mid, thresholds.top]).astype(np.uint16)
    buckets: npt.NDArray[np.uint8] = (confidence >= low).view(np.uint8) + (confidence >= mid).view(np.uint8)
    buckets += (confidence >= top).view(np.uint8)
    return buckets


def broken_rows(labels: ShardLabels, *kinds: Rules) -> npt.NDArray[np.int64]:
    """Return the numbers of the rows that break any of these rules, ascending."""
    if not labels.class_index.size:
        return np.empty(0, np.int64)
    step = max(1, CROPS_AT_ONCE // labels.num_crops)
    broken = np.zeros(len(labels), np.bool_)
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        columns = _Columns.of(labels, rows)
        for rules in kinds:
            for rule in rules(columns):
                broken[rows] |= rule.broken.any(axis=1)
    return np.flatnonzero(broken)


def crop_rules(labels: ShardLabels, *kinds: Rules) -> Iterator[Rule]:
    """Apply rules to all rows at once: for the few that `broken_rows` has found."""
    columns = _Columns.of(labels, slice(None))
    for rules in kinds:
        yield from rules(columns)


def image_rules(labels: ShardLabels, num_classes: int, pixel_limit: int) -> Iterator[Rule]:
    """Apply the rules for the columns of an image: masks (R,)."""
    yield Rule("height", labels.height == 0, "{value}, must be at least 1")
    yield Rule("width", labels.width == 0, "{value}, must be at least 1")
    too_large = labels.height.astype(np.int64) * labels.width > pixel_limit
    message = f"{{value}}: with its width more than the {pixel_limit} pixels that max_pixels allows"
    yield Rule("height", too_large, message)
    yield Rule("target", _strange(labels.target, num_classes), f"{{value}}, must be a class in 0..{num_classes - 1}")


def check_rows(path: str, labels: ShardLabels, num_classes: int) -> None:
    """Raise ShardError that names the first image or crop whose values cannot be, or a key that two rows have.

    Every class and target must be one of the classes, every probability in 0..1, and each crop's box inside its image.
    Agreement of the columns with each other is for `verify` to report, as trainers may derive buckets anew.
    """
    # The set decides, and the slower Counter only names the key.
    if len(set(labels.keys)) < len(labels):
        twice = next(key for key, count in Counter(labels.keys).items() if count > 1)
        raise ShardError(f"{path}: holds image {twice!r} twice; {DO_NOT_TRAIN}")
    check_targets(path, labels.target, num_classes)
    empty = np.flatnonzero((labels.height == 0) | (labels.width == 0))
    if len(empty):
        row = int(empty[0])
        size = f"{labels.height[row]}x{labels.width[row]}"
        raise ShardError(f"{path}: the size {size} of image {labels.keys[row]!r} is empty; {DO_NOT_TRAIN}")
    rows = broken_rows(labels, refusing_rules(num_classes))
    if len(rows) == 0:
        return
    # A second time for these few alone, to name the crop and its value: a sound label set never comes here.
    some = labels.take(rows)
    for rule in crop_rules(some, refusing_rules(num_classes)):
        if rule.broken.any():
            row, crop = np.argwhere(rule.broken)[0].tolist()
            value = getattr(some, rule.field)[row, crop].tolist()
            where = f"{NAMES[rule.field]} {value} of crop {crop} of image {some.keys[row]!r}"
            raise ShardError(f"{path}: {where} {rule.refusal}; {DO_NOT_TRAIN}")


def check_targets(path: str, target: npt.NDArray[np.int32], num_classes: int) -> None:
    """Raise ShardError for a target (R,) that is neither unknown nor one of the classes."""
    strange = _strange(target, num_classes)
    if strange.any():
        row = int(strange.argmax())
        raise ShardError(
            f"{path}: row {row} has target {target[row]} in a label set of {num_classes} classes; {DO_NOT_TRAIN}"
        )


def _strange(target: npt.NDArray[np.int32], num_classes: int) -> BoolArray:
    found: BoolArray = (target != UNKNOWN_TARGET) & ((target < 0) | (target >= num_classes))
    return found
