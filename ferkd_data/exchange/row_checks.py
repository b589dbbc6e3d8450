"""What every row of a label set must obey, as array operations over a whole shard.

Legend: R images, N crops per image, k kept classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.buckets import BUCKETS, Thresholds, assign_buckets, confidence
from ferkd_data.errors import ImageError
from ferkd_data.images import check_key
from ferkd_data.images.refs import MAX_KEY_BYTES
from ferkd_data.shards.columns import UNKNOWN_TARGET, ShardLabels
from ferkd_data.shards.row_screen import MAX_TOTAL, suspects

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class RowFault:
    row: int
    crop: int | None
    """None where the fault is the image's, not one crop's."""
    field: str
    message: str


PLAIN_KEYS = re.compile(r"(?:[\w-]+(?:/[\w-]+)*\n)*")
"""Keys, one a line, that nobody could object to, but for their length and the names that WebDataset keeps."""


def row_faults(
    labels: ShardLabels, *, num_classes: int, thresholds: Thresholds, pixel_limit: int, limit: int
) -> Iterator[RowFault]:
    """Every rule that a row breaks, once for each row and rule; at most `limit` rows for each rule."""
    yield from _key_faults(labels.keys)
    for field, bad, explain in _image_rules(labels, num_classes, pixel_limit):
        yield from _broken(field, bad, explain, labels, limit)
    rows = np.flatnonzero(suspects(labels, num_classes=num_classes, thresholds=thresholds))
    if len(rows) == 0:
        return
    some = labels.take(rows)
    rules = [*_box_rules(some), *_class_rules(some, num_classes)]
    rules += [*_target_prob_rules(some), *_bucket_rules(some, thresholds)]
    for field, bad, explain in rules:
        for fault in _broken(field, bad, explain, some, limit):
            yield replace(fault, row=int(rows[fault.row]))


def _key_faults(keys: Sequence[str]) -> Iterator[RowFault]:
    lines = "".join(f"{key}\n" for key in keys)
    # A character takes at most 4 bytes.
    short = 4 * max(map(len, keys), default=0) <= MAX_KEY_BYTES and lines.count("\n") == len(keys)
    if short and "__" not in lines and PLAIN_KEYS.fullmatch(lines):
        return
    for row, key in enumerate(keys):
        try:
            check_key(key)
        except ImageError as error:
            yield RowFault(row=row, crop=None, field="key", message=error.detail)


Explain = str
"""A message; `{value}` in it stands for the field's value at the fault."""
Rule = tuple[str, Any, Explain]
"""A field, where it is wrong as a mask (R,) or (R, N), and what to say."""


def _image_rules(labels: ShardLabels, num_classes: int, pixel_limit: int) -> Iterator[Rule]:
    yield "height", labels.height == 0, "{value}, must be at least 1"
    yield "width", labels.width == 0, "{value}, must be at least 1"
    too_large = labels.height.astype(np.int64) * labels.width > pixel_limit
    yield "height", too_large, f"{{value}}: with its width more than the {pixel_limit} pixels that max_pixels allows"
    unknown = labels.target == UNKNOWN_TARGET
    outside = ~unknown & ((labels.target < 0) | (labels.target >= num_classes))
    yield "target", outside, f"{{value}}, must be a class in 0..{num_classes - 1}"


def _box_rules(labels: ShardLabels) -> Iterator[Rule]:
    top, left, height, width = np.moveaxis(labels.boxes.astype(np.int32), 2, 0)
    yield "boxes", (height == 0) | (width == 0), "{value} (top, left, height, width) is empty"
    below = top + height > labels.height[:, None]
    right = left + width > labels.width[:, None]
    yield "boxes", below | right, "{value} (top, left, height, width) is not inside the image"


def _class_rules(labels: ShardLabels, num_classes: int) -> Iterator[Rule]:
    index = labels.class_index
    prob = labels.class_prob.astype(np.float32)
    yield "class_index", (index >= num_classes).any(axis=2), f"{{value}}, classes are 0..{num_classes - 1}"
    ranked = np.sort(index, axis=2)
    yield "class_index", (ranked[:, :, 1:] == ranked[:, :, :-1]).any(axis=2), "{value} names a class twice"
    finite = np.isfinite(prob.sum(axis=2))
    yield "class_prob", ~finite, "{value} is not finite"
    prob = np.where(finite[:, :, None], prob, 0)
    yield "class_prob", ((prob < 0) | (prob > 1)).any(axis=2), "{value} is not in 0..1"
    yield "class_prob", finite & (prob[:, :, 0] <= 0), "{value}: no class has a probability"
    rising: Mask = prob[:, :, 1:] > prob[:, :, :-1]
    yield "class_prob", rising.any(axis=2), "{value} is not descending"
    tied: Mask = (prob[:, :, 1:] == prob[:, :, :-1]) & (index[:, :, 1:] < index[:, :, :-1])
    yield "class_index", tied.any(axis=2), "{value}: equal probabilities are not in the order of their classes"
    yield "class_prob", prob.sum(axis=2) > MAX_TOTAL, "{value} sums to more than 1"


def _target_prob_rules(labels: ShardLabels) -> Iterator[Rule]:
    prob = labels.target_prob.astype(np.float32)
    known = (labels.target != UNKNOWN_TARGET)[:, None]
    absent = np.isnan(prob)
    yield "target_prob", ~known & ~absent, "{value}, though the ground truth is unknown"
    yield "target_prob", (prob < 0) | (prob > 1), "{value} is not in 0..1"
    is_target = labels.class_index == labels.target[:, None, None]
    kept = is_target.any(axis=2)
    said = np.where(is_target, labels.class_prob, 0).sum(axis=2, dtype=np.float32)
    # Labels imported from elsewhere do not know it where the ground truth was cut off.
    yield "target_prob", known & kept & absent, "is null, though the ground truth is among the classes kept"
    yield (
        "target_prob",
        known & kept & ~absent & (prob != said),
        "{value} is not the probability of this class in class_prob",
    )
    above = prob > labels.class_prob[:, :, -1].astype(np.float32)
    yield "target_prob", known & ~kept & above, "{value} is more than the least probability that was kept"


def _bucket_rules(labels: ShardLabels, thresholds: Thresholds) -> Iterator[Rule]:
    expected = assign_buckets(confidence(labels.class_prob, labels.target_prob, thresholds.confidence), thresholds)
    wrong = labels.bucket != expected
    names = ", ".join(f"{code} {name}" for code, name in enumerate(BUCKETS))
    yield "bucket", wrong, f"{{value}} is not what the manifest's thresholds say ({names})"


def _broken(field: str, bad: Mask, explain: str, labels: ShardLabels, limit: int) -> Iterator[RowFault]:
    rows = np.flatnonzero(bad if bad.ndim == 1 else bad.any(axis=1))[:limit].tolist()
    for row in rows:
        crop = None if bad.ndim == 1 else int(bad[row].argmax())
        values = getattr(labels, field)[row]
        value = values if crop is None else values[crop]
        more = 0 if crop is None else int(bad[row].sum()) - 1
        also = f" (and {more} more crops of this image)" if more else ""
        yield RowFault(row=row, crop=crop, field=field, message=explain.format(value=value.tolist()) + also)
