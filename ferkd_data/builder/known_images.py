"""Where an extended label set's images lie in the source: a join by key on disk, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple

from ferkd_data import rng
from ferkd_data.images import ImageRef
from ferkd_data.images.duplicates import ScratchTables

TABLES = (
    "known (hash BLOB PRIMARY KEY, row INTEGER, target INTEGER) WITHOUT ROWID",
    "rejected (hash BLOB PRIMARY KEY, listed INTEGER) WITHOUT ROWID",
    'refs (row INTEGER PRIMARY KEY, key TEXT, target INTEGER, file TEXT, "offset" INTEGER, length INTEGER)',
)


class Known(NamedTuple):
    row: int
    """Number of the label set's row."""
    target: int | None


class KnownImages:
    """What a label set has, and where the source has it. A context; gone when it ends."""

    def __enter__(self) -> KnownImages:
        self._tables = ScratchTables(*TABLES).__enter__()
        self._any_rejected = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tables.__exit__(kind, error, trace)

    def add_labelled(self, first_row: int, keys: Iterable[str], targets: Iterable[int | None]) -> None:
        rows = enumerate(zip(keys, targets, strict=True), first_row)
        self._tables.run_many(
            "INSERT INTO known VALUES (?, ?, ?)", ((rng.digest(key), row, target) for row, (key, target) in rows)
        )

    def add_rejected(self, keys: Iterable[str]) -> None:
        self._tables.run_many("INSERT OR IGNORE INTO rejected VALUES (?, 0)", ((rng.digest(key),) for key in keys))
        self._any_rejected = self._tables.run("SELECT 1 FROM rejected LIMIT 1").fetchone() is not None

    def find(self, key: str) -> Known | None:
        found = self._tables.run("SELECT row, target FROM known WHERE hash = ?", rng.digest(key)).fetchone()
        return None if found is None else Known(*found)

    def note_listed(self, key: str) -> None:
        """The source has this image, or a new verdict on it."""
        if self._any_rejected:
            self._tables.run("UPDATE rejected SET listed = 1 WHERE hash = ?", rng.digest(key))

    def is_listed(self, key: str) -> bool:
        """Whether an image that was rejected is still in the source."""
        (listed,) = self._tables.run("SELECT listed FROM rejected WHERE hash = ?", rng.digest(key)).fetchone()
        return bool(listed)

    def place(self, row: int, ref: ImageRef) -> None:
        """Remember what is to be labelled by the row that it has, or gets."""
        values = (row, ref.key, ref.target, ref.file, ref.offset, ref.length)
        self._tables.run("INSERT INTO refs VALUES (?, ?, ?, ?, ?, ?)", *values)

    def placed(self, start: int, stop: int) -> dict[int, ImageRef]:
        """What was placed in rows start .. stop - 1, in their order."""
        found = self._tables.run("SELECT * FROM refs WHERE row >= ? AND row < ? ORDER BY row", start, stop)
        return {
            row: ImageRef(key=key, target=target, file=file, offset=offset, length=length)
            for row, key, target, file, offset, length in found
        }
