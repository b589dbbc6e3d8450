"""Which rows may break a rule: a screen that lets the good ones pass at the speed of the memory.

It errs on one side only: a row that breaks a rule of `shards.checks` (what no reader accepts) or of
`exchange.row_checks` (what `verify` reports) never passes. What it stops is looked at again there.
Probabilities are compared as the bit patterns of their float16, which lie in the order of the values from 0 to 1.

Legend: R images, N crops per image, k kept classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.buckets import NUM_FLOAT16, Thresholds, from_patterns
from ferkd_data.shards.columns import UNKNOWN_TARGET, ShardLabels

Mask = npt.NDArray[np.bool_]
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


def suspects(labels: ShardLabels, *, num_classes: int, thresholds: Thresholds) -> Mask:
    """(R,): True for every row that breaks a rule of its crops, and for some that break none."""
    if not labels.class_index.size or labels.class_index.shape[2] > MAX_TOP_K:
        return np.ones(len(labels), np.bool_)
    step = max(1, CROPS_AT_ONCE // labels.num_crops)
    parts = [_screen(labels, slice(at, at + step), num_classes, thresholds) for at in range(0, len(labels), step)]
    return np.concatenate(parts)


def _screen(labels: ShardLabels, rows: slice, num_classes: int, thresholds: Thresholds) -> Mask:
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
    of_rows: Mask = np.logical_or.reduce(bad, axis=1)
    # A class that does not exist may look like one that does when it is cut to the size of class_index.
    of_rows |= ((target < 0) | (target >= num_classes)) & (target != UNKNOWN_TARGET)
    return of_rows


def _along_crops(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(R, N, k) as (k, R, N): comparing along the crops is 20 times as fast as along k classes."""
    return np.ascontiguousarray(np.moveaxis(values, 2, 0))


def _patterns(values: npt.NDArray[np.float16]) -> Patterns:
    return values.view(np.uint16)


def _boxes(boxes: npt.NDArray[np.uint16], image_height: npt.NDArray[Any], image_width: npt.NDArray[Any]) -> Mask:
    top, left, height, width = _along_crops(boxes)
    below, right = image_height[:, None], image_width[:, None]
    # Where top > below, the difference wraps, and the row is stopped already.
    bad: Mask = (height == 0) | (width == 0) | (top > below) | (left > right)
    bad |= (height > below - top) | (width > right - left)
    return bad


def _classes(index: npt.NDArray[Any], prob: Patterns, num_classes: int) -> Mask:
    bad: Mask = (index.max(axis=0) >= num_classes) | (prob.max(axis=0) >= NUM_FLOAT16) | (prob[0] == 0)
    for apart in range(1, len(index)):
        bad |= (index[apart:] == index[:-apart]).any(axis=0)
    rising = prob[1:] > prob[:-1]
    rising |= (prob[1:] == prob[:-1]) & (index[1:] < index[:-1])
    bad |= rising.any(axis=0)
    bad |= from_patterns(prob).sum(axis=0) > EXACT_TOTAL
    return bad


def _target_prob(index: npt.NDArray[Any], prob: Patterns, said: Patterns, absent: Mask, target: Any) -> Mask:
    is_target = index == target.astype(index.dtype)[:, None]
    kept = is_target.any(axis=0)
    is_target &= prob != said
    bad: Mask = is_target.any(axis=0) | (~kept & ~absent & (said > prob[-1]))
    unknown = (target == UNKNOWN_TARGET)[:, None]
    return np.where(unknown, ~absent, bad)


def _buckets(confidence: Patterns, thresholds: Thresholds) -> npt.NDArray[np.uint8]:
    """As buckets.assign_buckets, for patterns of 0..1."""
    low, mid, top = np.searchsorted(VALUES, [thresholds.low, thresholds.mid, thresholds.top]).astype(np.uint16)
    buckets: npt.NDArray[np.uint8] = (confidence >= low).view(np.uint8) + (confidence >= mid).view(np.uint8)
    buckets += (confidence >= top).view(np.uint8)
    return buckets
