"""Views of a label set: some of its rows, or its labels in terms of other classes.

Legend: R images of a shard, N crops per image, k kept classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.class_map import ClassMap, map_columns
from ferkd_data.format.manifest import FileEntry, Manifest
from ferkd_data.label_set.reader import RowReader, VerifyLabels
from ferkd_data.label_set.selection import Rows
from ferkd_data.labels.rows import ShardLabels
from ferkd_data.labels.statistics import Statistics
from ferkd_data.storage import OpenFile

MAPPED_COLUMNS = ("class_index", "class_prob", "target", "target_prob", "bucket")


def first_rows(manifest: Manifest) -> Rows:
    """Return (shards + 1,): the number of each shard's first row, and the number of all rows."""
    return np.cumsum([0, *(shard.rows for shard in manifest.shards)], dtype=np.int64)


def select_rows(reader: RowReader, rows: Rows) -> RowReader:
    """Show these rows of a reader, ascending. A selection of a selection is one of what lies below."""
    if isinstance(reader, SelectionReader):
        return SelectionReader(reader.base, reader.rows[rows])
    if isinstance(reader, MappedReader):
        return MappedReader(select_rows(reader.base, rows), reader.class_map)
    return SelectionReader(reader, rows)


def map_reader(reader: RowReader, class_map: ClassMap) -> RowReader:
    """Show a reader's labels in terms of other classes. A map of a map is one of the teacher's classes."""
    if isinstance(reader, MappedReader):
        return MappedReader(reader.base, reader.class_map.then(class_map))
    return MappedReader(reader, class_map)


class SelectionReader:
    """Some rows of another reader, as `LabelSet.select` shows them."""

    def __init__(self, base: RowReader, rows: Rows) -> None:
        self.base = base
        self.rows = rows
        """(R of all shards,) int64: rows of `base`, ascending."""
        self._base_first = first_rows(base.manifest)
        counts = np.diff(np.searchsorted(rows, self._base_first)).tolist()
        shards = tuple(
            entry.model_copy(update={"rows": count, "files": entry.files if count else ()})
            for entry, count in zip(base.manifest.shards, counts, strict=True)
        )
        # Shards keep their numbers, also where no row is left, so that `base` finds its files by the same number.
        changes = {"num_images": len(rows), "shards": shards, "statistics": Statistics()}
        self.manifest = base.manifest.model_copy(update=changes)
        self.num_crops = base.num_crops
        self.identity = _identity(base, b"rows", np.ascontiguousarray(rows, "<i8").tobytes())
        self._first = first_rows(self.manifest)

    def __repr__(self) -> str:
        return f"<{len(self.rows)} of {self.base!r}>"

    @property
    def statistics(self) -> None:
        return None

    @property
    def location(self) -> str:
        return self.base.location

    @property
    def is_local(self) -> bool:
        return self.base.is_local

    @property
    def cache_bytes(self) -> int:
        return self.base.cache_bytes

    def _rows_in(self, shard: int) -> Rows:
        """Return the selected rows of one shard, numbered within the shard of `base`."""
        mine = slice(int(self._first[shard]), int(self._first[shard + 1]))
        return np.asarray(self.rows[mine] - self._base_first[shard], np.int64)

    def block(self, shard: int, block: int) -> ShardLabels:
        return self.base.block(shard, block).take(self._rows_in(shard))

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        return self.base.raw_block(shard, block).take(self._rows_in(shard))

    def keys_of(self, shard: int) -> list[str]:
        keys = self.base.keys_of(shard)
        return [keys[row] for row in self._rows_in(shard).tolist()]

    def targets_of(self, shard: int) -> npt.NDArray[np.int32]:
        return self.base.targets_of(shard)[self._rows_in(shard)]

    def image_locations(self, shard: int) -> npt.NDArray[np.int64]:
        return self.base.image_locations(shard)[self._rows_in(shard)]

    def fetch(self, shard: int, block: int) -> None:
        self.base.fetch(shard, block)

    def check_size(self, shard: int, block: int) -> None:
        self.base.check_size(shard, block)

    def open(self, entry: FileEntry, *, check: bool = True) -> OpenFile:
        return self.base.open(entry, check=check)

    def verified(self, verify_labels: VerifyLabels) -> SelectionReader:
        return SelectionReader(self.base.verified(verify_labels), self.rows)


class MappedReader:
    """Another reader's labels in terms of other classes, as `LabelSet.map_classes` shows them."""

    def __init__(self, base: RowReader, class_map: ClassMap) -> None:
        self.base = base
        self.class_map = class_map
        changes = {
            "num_classes": class_map.num_classes,
            "class_names": class_map.names,
            "top_k": min(base.manifest.top_k, class_map.num_classes),
            "statistics": Statistics(),
        }
        self.manifest = base.manifest.model_copy(update=changes)
        self.num_crops = base.num_crops
        told = f"classes {class_map.num_classes}".encode()
        self.identity = _identity(base, told, class_map.new.astype("<i8").tobytes())

    def __repr__(self) -> str:
        return f"<{self.class_map.num_classes} classes out of the {self.base.manifest.num_classes} of {self.base!r}>"

    @property
    def statistics(self) -> None:
        return None

    @property
    def location(self) -> str:
        return self.base.location

    @property
    def is_local(self) -> bool:
        return self.base.is_local

    @property
    def cache_bytes(self) -> int:
        return self.base.cache_bytes

    def block(self, shard: int, block: int) -> ShardLabels:
        return self._mapped(self.base.block(shard, block))

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        return self._mapped(self.base.raw_block(shard, block))

    def _mapped(self, labels: ShardLabels) -> ShardLabels:
        columns = {name: getattr(labels, name) for name in MAPPED_COLUMNS}
        changed: dict[str, Any] = {**map_columns(self.class_map, columns, self.manifest.thresholds.absolute())}
        return replace(labels, **changed)

    def keys_of(self, shard: int) -> list[str]:
        return self.base.keys_of(shard)

    def targets_of(self, shard: int) -> npt.NDArray[np.int32]:
        return self.class_map.targets(self.base.targets_of(shard)).astype(np.int32)

    def image_locations(self, shard: int) -> npt.NDArray[np.int64]:
        return self.base.image_locations(shard)

    def fetch(self, shard: int, block: int) -> None:
        self.base.fetch(shard, block)

    def check_size(self, shard: int, block: int) -> None:
        self.base.check_size(shard, block)

    def open(self, entry: FileEntry, *, check: bool = True) -> OpenFile:
        return self.base.open(entry, check=check)

    def verified(self, verify_labels: VerifyLabels) -> MappedReader:
        return MappedReader(self.base.verified(verify_labels), self.class_map)


def _identity(base: RowReader, *told: bytes) -> str:
    """Hash the identity of `base` and what a view makes of it, so that the same view always has the same identity."""
    return hashlib.sha256(b"".join((base.identity.encode(), *told))).hexdigest()
