"""The faults of a label set, file by file and row by row: the pieces of `verify`.

Legend: R images, N crops per image, k kept classes.
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
from ferkd_data.images.keys import MAX_KEY_BYTES
from ferkd_data.label_set import LabelSet
from ferkd_data.label_set.reader import read_plain_tar
from ferkd_data.labels.buckets import NUM_FLOAT16, Thresholds
from ferkd_data.labels.checks import Rule, agreement_rules, broken_rows, crop_rules, image_rules, refusing_rules
from ferkd_data.labels.rows import CROP_FIELDS, ShardLabels
from ferkd_data.labels.statistics import Statistics, shard_statistics
from ferkd_data.storage import HashedFile


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, and where it is: a file and, as far as it is known, row, image, crop and field."""

    file: str
    """Path relative to the label set; for faults found with `images`, a file of the image source."""
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
    """The result of `verify`: counts, and the faults that were found.

    >>> report = fd.verify(LABELS)
    >>> report.ok, report.images, report.faults
    (True, 4, ())
    """

    files: int
    """Files checked: shard files, manifest and rejects."""
    bytes: int
    """Bytes of the shard files."""
    images: int
    crops: int
    """Crops of all images together."""
    faults: tuple[Fault, ...]
    """The first faults, at most `max_faults`."""
    faults_found: int
    """Number of all faults."""
    warnings: tuple[str, ...]
    """Lines about things that are no faults, such as files that the manifest does not list."""
    signer: str | None = None
    """Name of the manifest's signer, where that was asked for."""

    @property
    def ok(self) -> bool:
        return self.faults_found == 0

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class RowFault:
    """A fault of a row, before the file is known."""

    row: int
    crop: int | None
    """None where the fault is the image's, not one crop's."""
    field: str
    message: str


PLAIN_KEYS = re.compile(r"(?:[\w-]+(?:/[\w-]+)*\n)*")
"""Keys, one a line, that keep every rule, but for their length and the names that WebDataset reserves."""


def row_faults(
    labels: ShardLabels, *, num_classes: int, thresholds: Thresholds, pixel_limit: int, limit: int
) -> Iterator[RowFault]:
    """Yield every rule that a row breaks, once for each row and rule; at most `limit` rows for each rule."""
    yield from _key_faults(labels.keys)
    for rule in image_rules(labels, num_classes, pixel_limit):
        yield from _broken(rule, labels, limit)
    # In two steps: a mask says which rows break any rule, and only these are looked at rule by rule for the report.
    kinds = refusing_rules(num_classes), agreement_rules(num_classes, thresholds)
    rows = broken_rows(labels, *kinds)
    if len(rows) == 0:
        return
    some = labels.take(rows)
    for rule in crop_rules(some, *kinds):
        for fault in _broken(rule, some, limit):
            yield replace(fault, row=int(rows[fault.row]))


def _key_faults(keys: Sequence[str]) -> Iterator[RowFault]:
    lines = "".join(f"{key}\n" for key in keys)
    # A character takes at most 4 bytes.
    short = 4 * max(map(len, keys), default=0) <= MAX_KEY_BYTES and lines.count("\n") == len(keys)
    # One regular expression over all keys of a file: nearly all are plain, and the rules decide the others.
    if short and "__" not in lines and PLAIN_KEYS.fullmatch(lines):
        return
    for row, key in enumerate(keys):
        try:
            check_key(key)
        except ImageError as error:
            yield RowFault(row=row, crop=None, field="key", message=error.detail)


def _broken(rule: Rule, labels: ShardLabels, limit: int) -> Iterator[RowFault]:
    of_crops = rule.broken.ndim == 2
    for row in np.flatnonzero(rule.broken.any(axis=1) if of_crops else rule.broken)[:limit].tolist():
        # The first crop that breaks it; the others are counted.
        crop = int(rule.broken[row].argmax()) if of_crops else None
        values = getattr(labels, rule.field)[row]
        value = values if crop is None else values[crop]
        more = int(rule.broken[row].sum()) - 1 if of_crops else 0
        also = f" (and {more} more crops of this image)" if more else ""
        message = rule.explain.format(value=value.tolist()) + also
        yield RowFault(row=row, crop=crop, field=rule.field, message=message)


SAME_IN_BLOCKS = ("image_digest", "height", "width", "target")


@dataclass(kw_only=True)
class Block:
    """The faults, statistics and images of one file."""

    faults: list[Fault] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    rows: ShardLabels | None = None
    """Without their crops; None where the file cannot be read."""


class FileCheck:
    """Checks the files of a label set one by one. It holds no state of a file, so threads may share it."""

    def __init__(self, labels: LabelSet, max_faults: int, *, digests: bool) -> None:
        self.labels = labels
        self.manifest = labels.manifest
        self.max_faults = max_faults
        self.digests = digests
        """Whether the digests of images in tars are computed: only an image source has others to compare them with."""

    def file(self, entry: ShardEntry, file: BlockEntry) -> Block:
        """Find every fault that one file alone can show."""
        found = Block()
        labels = self._read(entry, file, found)
        if labels is None:
            return found
        # Rows with faults may hold values that counting would stumble over.
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
                # The tar was parsed while it was hashed; its rows count only if the digest is right.
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
            # Numbered within the image, as users know it, and not within the block.
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
    """Raise ShardError for the first fault of these rows, so that no command writes what `verify` would refuse."""
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
        raise ShardError(
            f"{fault}; nothing is written from a label set with faults; `ferkd-data verify` shows all of them"
        )


def differing(first: ShardLabels, other: ShardLabels, a: BlockEntry, b: BlockEntry) -> Iterator[Fault]:
    """Yield the differences between the image columns of two blocks of a shard, which must be the same."""
    if list(first.keys) != list(other.keys):
        # Both have as many rows as the manifest says, which reading has checked.
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
    """Return the error's text without the file at its start, which a `Fault` has in a field of its own."""
    return str(error).removeprefix(f"{location}/{name}: ")


def _statistics(labels: ShardLabels) -> Statistics:
    """Count rows that may hold impossible values: these count as 0, as 1 or as the last bucket."""
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
    # Patterns above that of 1.0: larger values, infinity, NaN, and everything negative.
    odd = patterns >= NUM_FLOAT16
    cleaned: npt.NDArray[np.float16] = prob.copy()
    cleaned[odd] = np.nan_to_num(prob[odd], posinf=1, neginf=0).clip(0, 1)
    return cleaned
