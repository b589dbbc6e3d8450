"""Values that no row may hold, whoever wrote it: one that is out of range would poison a training in silence.

Legend: R images of a shard, N crops per image, k kept classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.buckets import BUCKETS, Thresholds
from ferkd_data.errors import ShardError
from ferkd_data.shards.columns import UNKNOWN_TARGET, ShardLabels
from ferkd_data.shards.row_screen import MAX_TOTAL, suspects

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
