"""Views of a label set: some of its rows, the crops of one kind, or its labels in terms of other classes.

Legend: R images of a shard, N crops per image, k kept classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.class_map import ClassMap, map_columns
from ferkd_data.crop_kinds import kind_starts
from ferkd_data.errors import UsageError
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
        # Composed at once: a chain of selections would read and cut every block once for each of its links.
        return SelectionReader(reader.base, reader.rows[rows])
    if isinstance(reader, MappedReader):
        # The map stays outermost, so that the loader finds it and can cache stored labels below it.
        return MappedReader(select_rows(reader.base, rows), reader.class_map)
    return SelectionReader(reader, rows)


def map_reader(reader: RowReader, class_map: ClassMap) -> RowReader:
    """Show a reader's labels in terms of other classes. A map of a map is one of the teacher's classes."""
    if isinstance(reader, MappedReader):
        return MappedReader(reader.base, reader.class_map.then(class_map))
    return MappedReader(reader, class_map)


class View:
    """The methods that every view passes on to the reader below it, `base`: where files lie, and getting them."""

    base: RowReader

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

    @property
    def is_verified(self) -> bool:
        return self.base.is_verified

    def image_locations(self, shard: int) -> npt.NDArray[np.int64]:
        return self.base.image_locations(shard)

    def fetch(self, shard: int, block: int) -> None:
        self.base.fetch(shard, block)

    def check_size(self, shard: int, block: int) -> None:
        self.base.check_size(shard, block)

    def open(self, entry: FileEntry, *, check: bool = True) -> OpenFile:
        return self.base.open(entry, check=check)


class SelectionReader(View):
    """Some rows of another reader, as `LabelSet.select` shows them."""

    def __init__(self, base: RowReader, rows: Rows) -> None:
        self.base = base
        self.rows = rows
        """(R of all shards,) int64: rows of `base`, ascending."""
        self._base_first = first_rows(base.manifest)
        # Rows ascend, so those of a shard are the ones between its first row and the next shard's.
        counts = np.diff(np.searchsorted(rows, self._base_first)).tolist()
        shards = tuple(
            entry.model_copy(update={"rows": count, "files": entry.files if count else ()})
            for entry, count in zip(base.manifest.shards, counts, strict=True)
        )
        # Shards keep their numbers, also where no row is left, so that `base` finds its files by the same number.
        changes = {"num_images": len(rows), "shards": shards, "statistics": Statistics()}
        self.manifest = base.manifest.model_copy(update=changes)
        self.num_crops = base.num_crops
        # Little-endian on every machine: a state saved on one fits on another.
        self.identity = _identity(base, b"rows", np.ascontiguousarray(rows, "<i8").tobytes())
        self._first = first_rows(self.manifest)

    def __repr__(self) -> str:
        return f"<{len(self.rows)} of {self.base!r}>"

    def _rows_in(self, shard: int) -> Rows:
        """Return the selected rows of one shard, numbered within the shard of `base`."""
        mine = slice(int(self._first[shard]), int(self._first[shard + 1]))
        return np.asarray(self.rows[mine] - self._base_first[shard], np.int64)

    def block(self, shard: int, block: int) -> ShardLabels:
        return self.base.block(shard, block).take(self._rows_in(shard))

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        return self.base.raw_block(shard, block).take(self._rows_in(shard))

    def keys_of(self, shard: int, block: int = 0) -> list[str]:
        keys = self.base.keys_of(shard, block)
        return [keys[row] for row in self._rows_in(shard).tolist()]

    def targets_of(self, shard: int, block: int = 0) -> npt.NDArray[np.int32]:
        return self.base.targets_of(shard, block)[self._rows_in(shard)]

    def image_locations(self, shard: int) -> npt.NDArray[np.int64]:
        return self.base.image_locations(shard)[self._rows_in(shard)]

    def verified(self, verify_labels: VerifyLabels) -> SelectionReader:
        return SelectionReader(self.base.verified(verify_labels), self.rows)


def select_kind(reader: RowReader, name: str, crops: int | None) -> RowReader:
    """Show the crops of one kind, or the first `crops` of them. Raises UsageError as `LabelSet.crop_kind` does."""
    if isinstance(reader, MappedReader):
        return MappedReader(select_kind(reader.base, name, crops), reader.class_map)
    return KindReader(reader, name, crops)


class KindReader(View):
    """The crops of one kind of another reader, as `LabelSet.crop_kind` shows them. Its first crop is crop 0 here."""

    def __init__(self, base: RowReader, name: str, crops: int | None) -> None:
        kinds = base.manifest.kinds
        number = next((number for number, kind in enumerate(kinds) if kind.name == name), None)
        if number is None:
            there = f"it has {', '.join(kind.name for kind in kinds)}" if kinds else "it was built without crop kinds"
            raise UsageError(f"{base.location}: has no crop kind {name!r}; {there}")
        self.base = base
        self.kind = kind = kinds[number]
        self._first = kind_starts(kinds)[number]
        # A label set that was opened with fewer crops may end within this kind.
        shown = min(kind.crops, base.num_crops - self._first)
        if crops is not None and not 1 <= crops <= shown:
            raise UsageError(f"{base.location}: crops must be 1..{shown} for the crop kind {name!r}, got {crops}")
        self.num_crops = shown if crops is None else crops
        self._asked = crops
        self.manifest = self._manifest()
        self.identity = _identity(base, f"crop kind {name} {self.num_crops}".encode())

    def _manifest(self) -> Manifest:
        """Return the manifest of a label set that has this kind alone; files keep the block numbers of `base`."""
        whole, changes = self.base.manifest, dict[str, Any]()
        entry = next(entry for entry in whole.crop_kinds or () if entry.name == self.kind.name)
        if whole.layout == "parquet":
            blocks = slice(self._first_block, self._first_block + -(-self.kind.crops // whole.crops_per_block))
            shards = [shard.model_copy(update={"files": shard.files[blocks]}) for shard in whole.shards]
            changes["shards"] = tuple(shards)
        # The crops of the files; `num_crops` above is how many of them are shown.
        changes |= {"num_crops": self.kind.crops, "crop_kinds": (entry,), "statistics": Statistics()}
        return whole.model_copy(update=changes)

    @property
    def _first_block(self) -> int:
        # No crop block holds crops of two kinds, which the manifest's check makes sure of.
        manifest = self.base.manifest
        return self._first // manifest.crops_per_block if manifest.layout == "parquet" else 0

    def __repr__(self) -> str:
        return f"<{self.num_crops} crops of kind {self.kind.name!r} of {self.base!r}>"

    def block(self, shard: int, block: int) -> ShardLabels:
        return self._of_kind(self.base.block(shard, self._first_block + block))

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        return self._of_kind(self.base.raw_block(shard, self._first_block + block))

    def _of_kind(self, labels: ShardLabels) -> ShardLabels:
        if self.manifest.layout == "parquet":
            return labels
        return labels.crop_range(self._first, self._first + self.kind.crops)

    def keys_of(self, shard: int, block: int = 0) -> list[str]:
        # Out of a file of this kind: a label set on a server need not fetch any other for them.
        return self.base.keys_of(shard, self._first_block + block)

    def targets_of(self, shard: int, block: int = 0) -> npt.NDArray[np.int32]:
        return self.base.targets_of(shard, self._first_block + block)

    def fetch(self, shard: int, block: int) -> None:
        self.base.fetch(shard, self._first_block + block)

    def check_size(self, shard: int, block: int) -> None:
        self.base.check_size(shard, self._first_block + block)

    def verified(self, verify_labels: VerifyLabels) -> KindReader:
        return KindReader(self.base.verified(verify_labels), self.kind.name, self._asked)


class MappedReader(View):
    """Another reader's labels in terms of other classes, as `LabelSet.map_classes` shows them."""

    def __init__(self, base: RowReader, class_map: ClassMap) -> None:
        self.base = base
        self.class_map = class_map
        changes = {
            "num_classes": class_map.num_classes,
            "class_names": class_map.names,
            # A crop cannot keep more classes than there are.
            "top_k": min(base.manifest.top_k, class_map.num_classes),
            "statistics": Statistics(),
        }
        self.manifest = base.manifest.model_copy(update=changes)
        self.num_crops = base.num_crops
        size = f"classes {class_map.num_classes}".encode()
        self.identity = _identity(base, size, class_map.new.astype("<i8").tobytes())

    def __repr__(self) -> str:
        return f"<{self.class_map.num_classes} classes out of the {self.base.manifest.num_classes} of {self.base!r}>"

    def block(self, shard: int, block: int) -> ShardLabels:
        return self._mapped(self.base.block(shard, block))

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        return self._mapped(self.base.raw_block(shard, block))

    def _mapped(self, labels: ShardLabels) -> ShardLabels:
        columns = {name: getattr(labels, name) for name in MAPPED_COLUMNS}
        changed: dict[str, Any] = {**map_columns(self.class_map, columns, self.manifest.thresholds.absolute())}
        return replace(labels, **changed)

    def keys_of(self, shard: int, block: int = 0) -> list[str]:
        return self.base.keys_of(shard, block)

    def targets_of(self, shard: int, block: int = 0) -> npt.NDArray[np.int32]:
        return self.class_map.targets(self.base.targets_of(shard, block)).astype(np.int32)

    def verified(self, verify_labels: VerifyLabels) -> MappedReader:
        return MappedReader(self.base.verified(verify_labels), self.class_map)


def _identity(base: RowReader, *content: bytes) -> str:
    """Hash the identity of `base` and what a view makes of it, so that the same view always has the same identity."""
    return hashlib.sha256(b"".join((base.identity.encode(), *content))).hexdigest()
