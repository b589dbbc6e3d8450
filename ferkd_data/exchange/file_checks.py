"""What one file of a label set can show, and the blocks of one shard beside each other.

Legend: R images of a shard, N crops per image, k kept classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ferkd_data.buckets import NUM_FLOAT16
from ferkd_data.errors import LabelSetError, RemoteError, ShardError
from ferkd_data.exchange.faults import Fault
from ferkd_data.exchange.row_checks import row_faults
from ferkd_data.label_set import LabelSet
from ferkd_data.manifest import BlockEntry, Manifest, ShardEntry
from ferkd_data.shards.columns import CROP_FIELDS, ShardLabels
from ferkd_data.statistics import Statistics, shard_statistics
from ferkd_data.storage import HashedFile

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
                    plain = self.labels.plain_rows(entry.index, hashed.read, digests=self.digests)
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
