"""What `verify` found.

What every row of a label set must obey, as array operations over a whole shard.

Legend: R images, N crops per image, k kept classes.

What one file of a label set can show, and the blocks of one shard beside each other.

Legend: R images of a shard, N crops per image, k kept classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import ImageError, LabelSetError, RemoteError, ShardError
from ferkd_data.format.manifest import BlockEntry, Manifest, ShardEntry
from ferkd_data.images import check_key
from ferkd_data.images.refs import MAX_KEY_BYTES
from ferkd_data.label_set import LabelSet
from ferkd_data.label_set.reader import read_plain_tar
from ferkd_data.labels.buckets import BUCKETS, NUM_FLOAT16, Thresholds, assign_buckets, confidence
from ferkd_data.labels.checks import MAX_TOTAL, suspects
from ferkd_data.labels.rows import CROP_FIELDS, UNKNOWN_TARGET, ShardLabels
from ferkd_data.labels.statistics import Statistics, shard_statistics
from ferkd_data.storage import HashedFile


@dataclass(frozen=True, kw_only=True)
class Fault:
    file: str
    """Relative to the label set; of the image source for faults found with `images`."""
    message: str
    row: int | None = None
    key: str | None = None
    crop: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        row = None if self.row is None else f"row {self.row}"
        key = None if self.key is None else f"image {self.key!r}"
        crop = None if self.crop is None else f"crop {self.crop}"
        where = ", ".join(part for part in (row, key, crop, self.field) if part)
        return ": ".join(part for part in (self.file, where, self.message) if part)


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    files: int
    bytes: int
    images: int
    crops: int
    faults: tuple[Fault, ...]
    """The first ones, at most as many as were asked for."""
    faults_found: int
    warnings: tuple[str, ...]
    signer: str | None = None
    """Who signed the manifest, where that was asked for."""

    @property
    def ok(self) -> bool:
        return self.faults_found == 0

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


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
    for column, bad, explain in _image_rules(labels, num_classes, pixel_limit):
        yield from _broken(column, bad, explain, labels, limit)
    rows = np.flatnonzero(suspects(labels, num_classes=num_classes, thresholds=thresholds))
    if len(rows) == 0:
        return
    some = labels.take(rows)
    rules = [*_box_rules(some), *_class_rules(some, num_classes)]
    rules += [*_target_prob_rules(some), *_bucket_rules(some, thresholds)]
    for column, bad, explain in rules:
        for fault in _broken(column, bad, explain, some, limit):
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


SAME_IN_BLOCKS = ("image_digest", "height", "width", "target")


@dataclass(kw_only=True)
class Block:
    """What one file showed."""

    faults: list[Fault] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    rows: ShardLabels | None = None
    """Without their crops; None where the file cannot be read."""


class FileCheck:
    """Can be used by several threads at once."""

    def __init__(self, labels: LabelSet, max_faults: int, *, digests: bool) -> None:
        self.labels = labels
        self.manifest = labels.manifest
        self.max_faults = max_faults
        self.digests = digests
        """Whether those of the images in tars are needed: nothing in a label set says what they should be."""

    def file(self, entry: ShardEntry, file: BlockEntry) -> Block:
        """Everything that can be said of one file alone."""
        found = Block()
        labels = self._read(entry, file, found)
        if labels is None:
            return found
        found.statistics = _statistics(labels) if found.faults else shard_statistics(labels)
        # Copies, so that the crops can go.
        found.rows = replace(labels, **{name: getattr(labels, name)[:, :0].copy() for name in CROP_FIELDS})
        return found

    def _read(self, entry: ShardEntry, file: BlockEntry, found: Block) -> ShardLabels | None:
        try:
            # A local file is hashed here, while it is read; one that was damaged in the cache is fetched again first.
            with self.labels.open(file, check=not self.labels.is_local) as opened:
                hashed = HashedFile(opened)
                plain = None
                if self.manifest.layout == "webdataset":
                    plain = read_plain_tar(self.manifest, entry.index, hashed.read, digests=self.digests)
                if hashed.sha256() != file.sha256:
                    raise ShardError(f"{opened.path}: the bytes are not those of the manifest (SHA-256 differs)")
                # Other libraries see only bytes that are those of the manifest.
                labels = self.labels.raw_block(entry.index, file.block) if plain is None else plain
        except (LabelSetError, RemoteError, OSError) as error:
            found.faults.append(Fault(file=file.path, message=without_path(error, self.labels.location, file.path)))
            return None
        thresholds = self.manifest.thresholds.absolute()
        for fault in row_faults(
            labels,
            num_classes=self.manifest.num_classes,
            thresholds=thresholds,
            pixel_limit=self.manifest.pixel_limit,
            limit=max(self.max_faults, 1),
        ):
            crop = None if fault.crop is None else fault.crop + file.block * self.manifest.crops_per_block
            found.faults.append(
                Fault(
                    file=file.path,
                    row=fault.row,
                    key=labels.keys[fault.row],
                    crop=crop,
                    field=fault.field,
                    message=fault.message,
                )
            )
        return labels


def check_as_verify_does(rows: ShardLabels, manifest: Manifest, where: str) -> None:
    """Raises ShardError for the first fault of these rows, so that nobody writes what `verify` would refuse."""
    thresholds = manifest.thresholds.absolute()
    classes, pixels = manifest.num_classes, manifest.pixel_limit
    for found in row_faults(rows, num_classes=classes, thresholds=thresholds, pixel_limit=pixels, limit=1):
        fault = Fault(
            file=where,
            row=found.row,
            key=rows.keys[found.row],
            crop=found.crop,
            field=found.field,
            message=found.message,
        )
        raise ShardError(f"{fault}; it is not written on. ferkd-data verify shows all faults of a label set")


def differing(first: ShardLabels, other: ShardLabels, a: BlockEntry, b: BlockEntry) -> Iterator[Fault]:
    """The columns of the image must be the same in all its blocks."""
    if list(first.keys) != list(other.keys):
        row = next(i for i, (x, y) in enumerate(zip(first.keys, other.keys, strict=True)) if x != y)
        yield Fault(
            file=b.path, row=row, key=other.keys[row], field="key", message=f"{a.path} has {first.keys[row]!r} here"
        )
        return
    for name in SAME_IN_BLOCKS:
        x, y = getattr(first, name), getattr(other, name)
        bad = (x != y).reshape(len(x), -1).any(axis=1)
        if bad.any():
            row = int(bad.argmax())
            yield Fault(file=b.path, row=row, key=other.keys[row], field=name, message=f"differs from {a.path}")


def without_path(error: Exception, location: str, name: str) -> str:
    return str(error).removeprefix(f"{location}/{name}: ")


def _statistics(labels: ShardLabels) -> Statistics:
    """Of rows that may be rubbish: what cannot be counted counts as 0 or as the last."""
    return shard_statistics(
        replace(
            labels,
            class_prob=_clean(labels.class_prob),
            target_prob=_clean(labels.target_prob),
            bucket=labels.bucket.clip(max=3),
        )
    )


def _clean(prob: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    patterns = prob.view(np.uint16)
    if patterns.max(initial=0) < NUM_FLOAT16:
        return prob
    odd = patterns >= NUM_FLOAT16
    cleaned: npt.NDArray[np.float16] = prob.copy()
    cleaned[odd] = np.nan_to_num(prob[odd], posinf=1, neginf=0).clip(0, 1)
    return cleaned
