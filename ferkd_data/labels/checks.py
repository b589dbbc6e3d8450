"""Which rows may break a rule: a screen that lets the good ones pass at the speed of the memory.

It errs on one side only: a row that breaks a rule of `shards.checks` (what no reader accepts) or of
`exchange.row_checks` (what `verify` reports) never passes. What it stops is looked at again there.
Probabilities are compared as the bit patterns of their float16, which lie in the order of the values from 0 to 1.

Legend: R images, N crops per image, k kept classes.

Values that no row may hold, whoever wrote it: one that is out of range would poison a training in silence.

Legend: R images of a shard, N crops per image, k kept classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import ShardError
from ferkd_data.labels.buckets import BUCKETS, NUM_FLOAT16, Thresholds, from_patterns
from ferkd_data.labels.rows import UNKNOWN_TARGET, ShardLabels

BoolArray = npt.NDArray[np.bool_]
Patterns = npt.NDArray[np.uint16]

MAX_TOTAL = 1 + 2**-10
"""The largest sum of a crop's probabilities: rounding to float16 raises a sum of 1 by at most half of the excess."""
CROPS_AT_ONCE = 16384
"""So that what is compared stays in a core's cache."""
INFINITY, NO_SIGN = 0x7C00, 0x7FFF
VALUES = np.arange(NUM_FLOAT16, dtype=np.uint16).view(np.float16).astype(np.float64)
"""The numbers from 0 to 1 that float16 has, by their patterns."""
EXACT_TOTAL = MAX_TOTAL - 2**-12
"""Below it, no order of adding up to 2,048 probabilities as float32 comes out above MAX_TOTAL."""
MAX_TOP_K = 2048


def suspects(labels: ShardLabels, *, num_classes: int, thresholds: Thresholds) -> BoolArray:
    """(R,): True for every row that breaks a rule of its crops, and for some that break none."""
    if not labels.class_index.size or labels.class_index.shape[2] > MAX_TOP_K:
        return np.ones(len(labels), np.bool_)
    step = max(1, CROPS_AT_ONCE // labels.num_crops)
    parts = [_screen(labels, slice(at, at + step), num_classes, thresholds) for at in range(0, len(labels), step)]
    return np.concatenate(parts)


def _screen(labels: ShardLabels, rows: slice, num_classes: int, thresholds: Thresholds) -> BoolArray:
    index = _along_crops(labels.class_index[rows])
    prob = _along_crops(_patterns(labels.class_prob[rows]))
    said = _patterns(labels.target_prob[rows])
    target = labels.target[rows]
    absent = (said & NO_SIGN) > INFINITY
    bad = _boxes(labels.boxes[rows], labels.height[rows], labels.width[rows])
    bad |= _classes(index, prob, num_classes)
    bad |= _target_prob(index, prob, said, absent, target)
    confidence = prob[0] if thresholds.confidence == "max" else np.where(absent, prob[0], said)
    bad |= np.not_equal(labels.bucket[rows], _buckets(confidence, thresholds))
    of_rows: BoolArray = np.logical_or.reduce(bad, axis=1)
    # A class that does not exist may look like one that does when it is cut to the size of class_index.
    of_rows |= ((target < 0) | (target >= num_classes)) & (target != UNKNOWN_TARGET)
    return of_rows


def _along_crops(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(R, N, k) as (k, R, N): comparing along the crops is 20 times as fast as along k classes."""
    return np.ascontiguousarray(np.moveaxis(values, 2, 0))


def _patterns(values: npt.NDArray[np.float16]) -> Patterns:
    return values.view(np.uint16)


def _boxes(boxes: npt.NDArray[np.uint16], image_height: npt.NDArray[Any], image_width: npt.NDArray[Any]) -> BoolArray:
    top, left, height, width = _along_crops(boxes)
    below, right = image_height[:, None], image_width[:, None]
    # Where top > below, the difference wraps, and the row is stopped already.
    bad: BoolArray = (height == 0) | (width == 0) | (top > below) | (left > right)
    bad |= (height > below - top) | (width > right - left)
    return bad


def _classes(index: npt.NDArray[Any], prob: Patterns, num_classes: int) -> BoolArray:
    bad: BoolArray = (index.max(axis=0) >= num_classes) | (prob.max(axis=0) >= NUM_FLOAT16) | (prob[0] == 0)
    for apart in range(1, len(index)):
        bad |= (index[apart:] == index[:-apart]).any(axis=0)
    rising = prob[1:] > prob[:-1]
    rising |= (prob[1:] == prob[:-1]) & (index[1:] < index[:-1])
    bad |= rising.any(axis=0)
    bad |= from_patterns(prob).sum(axis=0) > EXACT_TOTAL
    return bad


def _target_prob(index: npt.NDArray[Any], prob: Patterns, said: Patterns, absent: BoolArray, target: Any) -> BoolArray:
    is_target = index == target.astype(index.dtype)[:, None]
    kept = is_target.any(axis=0)
    is_target &= prob != said
    bad: BoolArray = is_target.any(axis=0) | (~kept & ~absent & (said > prob[-1]))
    unknown = (target == UNKNOWN_TARGET)[:, None]
    return np.where(unknown, ~absent, bad)


def _buckets(confidence: Patterns, thresholds: Thresholds) -> npt.NDArray[np.uint8]:
    """As buckets.assign_buckets, for patterns of 0..1."""
    low, mid, top = np.searchsorted(VALUES, [thresholds.low, thresholds.mid, thresholds.top]).astype(np.uint16)
    buckets: npt.NDArray[np.uint8] = (confidence >= low).view(np.uint8) + (confidence >= mid).view(np.uint8)
    buckets += (confidence >= top).view(np.uint8)
    return buckets


Mask = Any
"""An array of bools: NumPy's stubs cannot tell what comparing and joining masks gives."""
Rule = tuple[str, Mask]
"""A fault in words that follow the value, and where there is none: (R,) or (R, N)."""


def check_rows(path: str, labels: ShardLabels, num_classes: int, thresholds: Thresholds) -> None:
    """Raises ShardError that names the first image or crop whose values cannot be, or a key that two rows have.

    Every class and target must be one of the classes, every probability in 0..1, and each crop's box inside its image.
    Whether buckets follow the `thresholds` is for `verify` to say; here they only tell the screen what to expect.
    """
    if len(set(labels.keys)) < len(labels):
        twice = next(key for key, count in Counter(labels.keys).items() if count > 1)
        raise ShardError(f"{path}: holds image {twice!r} twice; do not train on this label set")
    check_targets(path, labels.target, num_classes)
    _check(path, labels, {"size": _size_rules(labels)})
    rows = np.flatnonzero(suspects(labels, num_classes=num_classes, thresholds=thresholds))
    if len(rows) == 0:
        return
    some = labels.take(rows)
    _check(
        path,
        some,
        {
            "class_prob": _probability_rules(some),
            "class_index": _class_rules(some, num_classes),
            "target_prob": _target_prob_rules(some),
            "bucket": _bucket_rules(some),
            "boxes": _box_rules(some),
        },
    )


def check_targets(path: str, target: npt.NDArray[np.int32], num_classes: int) -> None:
    """Raises ShardError for a target (R,) that is neither unknown nor one of the classes."""
    strange = (target != UNKNOWN_TARGET) & ((target < 0) | (target >= num_classes))
    if strange.any():
        row = int(strange.argmax())
        raise ShardError(
            f"{path}: row {row} has target {target[row]} in a label set of {num_classes} classes; do not train on "
            "this label set"
        )


def _check(path: str, labels: ShardLabels, rules_of: dict[str, Iterator[Rule]]) -> None:
    for field, rules in rules_of.items():
        for what, fine in rules:
            if not fine.all():
                raise ShardError(f"{path}: {_first(labels, field, fine)} {what}; do not train on this label set")


def _size_rules(labels: ShardLabels) -> Iterator[Rule]:
    yield "is empty", (labels.height > 0) & (labels.width > 0)


def _probability_rules(labels: ShardLabels) -> Iterator[Rule]:
    prob = labels.class_prob.astype(np.float32)
    total = prob.sum(axis=2)
    yield "are not all finite", np.isfinite(total)
    yield "are not descending", (prob[:, :, 1:] <= prob[:, :, :-1]).all(axis=2)
    yield "are negative", prob[:, :, -1] >= 0
    yield "are all 0", prob[:, :, 0] > 0
    yield "sum to more than 1", total <= MAX_TOTAL


def _class_rules(labels: ShardLabels, num_classes: int) -> Iterator[Rule]:
    index = labels.class_index
    if index.size:
        known = index < num_classes
        yield f"hold class {index.max()} in a label set of {num_classes} classes", known.all(axis=2)
    ranked = np.sort(index, axis=2)
    yield "name a class twice", (ranked[:, :, 1:] != ranked[:, :, :-1]).all(axis=2)


def _target_prob_rules(labels: ShardLabels) -> Iterator[Rule]:
    prob = labels.target_prob.astype(np.float32)
    yield "is not in 0..1", np.isnan(prob) | ((prob >= 0) & (prob <= 1))


def _bucket_rules(labels: ShardLabels) -> Iterator[Rule]:
    yield f"is none of the {len(BUCKETS)} buckets", labels.bucket < len(BUCKETS)


def _box_rules(labels: ShardLabels) -> Iterator[Rule]:
    top, left, height, width = np.moveaxis(labels.boxes.astype(np.int32), 2, 0)
    yield "(top, left, height, width) is empty", (height > 0) & (width > 0)
    inside = (top + height <= labels.height[:, None]) & (left + width <= labels.width[:, None])
    yield "(top, left, height, width) is not inside its image", inside


NAMES = {
    "size": "the size",
    "class_prob": "the probabilities",
    "class_index": "the classes",
    "target_prob": "the target's probability",
    "bucket": "the bucket",
    "boxes": "the box",
}


def _first(labels: ShardLabels, field: str, fine: Mask) -> str:
    """Name the first value that breaks a rule, its crop and its image."""
    row, *crop = np.argwhere(~fine)[0].tolist()
    image = f"of image {labels.keys[row]!r}"
    if field == "size":
        return f"the size {labels.height[row]}x{labels.width[row]} {image}"
    at = (row, *crop)
    value = getattr(labels, field)[at].tolist()
    return f"{NAMES[field]} {value} {f'of crop {crop[0]} ' if crop else ''}{image}"
