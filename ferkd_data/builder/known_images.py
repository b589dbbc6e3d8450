"""Find an extended label set's images in the source: a join by key, of any length, in bounded memory.

The label set's images go into an SQLite database in a temporary folder. Then each image that the source lists is looked
up and gets its position: the row that it has in the label set, or one after all of these. The plan of the extension is
read back in the order of the positions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ferkd_data.builder.plan import SCHEMA as PLAN
from ferkd_data.images import ImageRef
from ferkd_data.images.keys import scratch_full
from ferkd_data.scratch import Scratch

CACHE_KIB = 8 * 1024
"""Memory of SQLite; beyond it, the system's page cache serves."""
NO_TARGET = -1
COMPARED = 32
"""Images at least, of those that the label set and the source both have, whose bytes are compared; all of fewer."""
TABLES = """
CREATE TABLE known (key BLOB PRIMARY KEY, position INTEGER, target INTEGER, image_digest BLOB) WITHOUT ROWID;
CREATE TABLE rejected (key BLOB, number INTEGER, PRIMARY KEY (key, number)) WITHOUT ROWID;
CREATE TABLE listed (
    position INTEGER PRIMARY KEY, key BLOB, target INTEGER, file TEXT, offset INTEGER, length INTEGER, image_digest BLOB
);
"""


class Found(NamedTuple):
    """An image that the label set and the source both have."""

    key: str
    saved: int | None = None
    """The image's target in the label set."""
    now: int | None = None
    """Its target in the source."""


class KnownImages:
    """Join of a label set's images with a source's, by key.

    A context: first come the images of the label set, then those that the source lists, then `placed`.
    """

    def __init__(self, num_known: int, num_rejected: int) -> None:
        self.num_known = num_known
        self.num_listed = self.num_found = 0
        self.max_target = NO_TARGET
        self.mismatch: Found | None = None
        """The first image of the source whose target is another in the label set."""
        self.samples: list[tuple[ImageRef, bytes]] = []
        """Images that were found, spread over the listing, with the digests that they had when they were labelled."""
        self._stride = 1
        # A byte for each old reject. Everything else that grows with the data set is in the database.
        self.is_gone = np.ones(num_rejected, np.bool_)
        """(num_rejected,): True for a rejected image of the label set that the source does not have any more."""

    def __enter__(self) -> KnownImages:
        self._folder = Scratch("keys")
        self._database = sqlite3.connect(f"{self._folder.path}/keys.sqlite", isolation_level=None)
        # Nothing has to survive this process: no journal, and no waiting for the disk.
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KIB}"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.executescript(TABLES)
        self._database.execute("BEGIN")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self._folder.remove()

    def add_labelled(
        self,
        first_row: int,
        keys: Sequence[str],
        targets: Sequence[int | None],
        digests: Sequence[bytes],
    ) -> None:
        """Add rows `first_row` … of the label set. Raises StorageFullError."""
        rows = range(first_row, first_row + len(keys))
        with self._growing():
            added = zip(map(_encoded, keys), rows, targets, digests, strict=True)
            self._database.executemany("INSERT INTO known VALUES (?, ?, ?, ?)", added)

    def add_rejected(self, first: int, keys: Sequence[str]) -> None:
        """Add rejected images `first` … of the label set. Raises StorageFullError."""
        with self._growing():
            numbered = zip(map(_encoded, keys), range(first, first + len(keys)), strict=True)
            self._database.executemany("INSERT INTO rejected VALUES (?, ?)", numbered)

    def add_named(self, keys: Iterable[str]) -> None:
        """Note images that the source rejects: they are not gone."""
        if len(self.is_gone):
            for key in keys:
                found = self._database.execute("SELECT number FROM rejected WHERE key = ?", (_encoded(key),))
                self.is_gone[[number for (number,) in found]] = False

    def add_listed(self, refs: Sequence[ImageRef]) -> None:
        """Look up the next images of the source. Raises StorageFullError."""
        self.add_named(ref.key for ref in refs)
        with self._growing():
            listed = [self._listed(ref) for ref in refs]
            self._database.executemany("INSERT INTO listed VALUES (?, ?, ?, ?, ?, ?, ?)", listed)

    def missing(self) -> str | None:
        """Return the key of the first image of the label set that the source did not list."""
        if self.num_found == self.num_known:
            return None
        # An aggregate gives one row, with the columns of the smallest position (SQLite's rule for a bare column beside
        # MIN).
        (first,) = self._database.execute(
            "SELECT known.key, MIN(known.position) FROM known LEFT JOIN listed USING (position) "
            "WHERE listed.position IS NULL"
        )
        return str(first[0].decode())

    def placed(self, sizes: Iterable[int], *, place_known: bool) -> Iterator[pa.Table]:
        """Yield the images of the source by position, in tables of these sizes, with the schema of the plan.

        Images that the label set has are left out unless `place_known`. Tables are short, then empty, at the end.
        """
        fields = ", ".join(PLAN.names)
        first = 0 if place_known else self.num_known
        listed = self._database.execute(f"SELECT {fields} FROM listed WHERE position >= ? ORDER BY position", (first,))
        for size in sizes:
            rows = listed.fetchmany(size) if size else []  # fetchmany(0) would take them all
            keys, *columns = zip(*rows, strict=True) if rows else [()] * len(PLAN)
            yield pa.table([[key.decode() for key in keys], *columns], schema=PLAN)

    def _listed(self, ref: ImageRef) -> tuple[int | bytes | str | None, ...]:
        key = _encoded(ref.key)
        # New images come after all known ones, in the order of the listing.
        position, digest = self.num_known + self.num_listed, None
        self.num_listed += 1
        self.max_target = max(self.max_target, NO_TARGET if ref.target is None else ref.target)
        known = self._database.execute("SELECT position, target, image_digest FROM known WHERE key = ?", (key,))
        for row, target, digest_then in known:
            position, digest = row, digest_then
            self._sample(ref, digest_then)
            self.num_found += 1
            if target != ref.target and self.mismatch is None:
                self.mismatch = Found(ref.key, target, ref.target)
        return (position, key, ref.target, ref.file, ref.offset, ref.length, digest)

    def _sample(self, ref: ImageRef, digest: bytes) -> None:
        """Keep every `_stride`-th image that is found, and fewer of them as more are found."""
        if self.num_found % self._stride:
            return
        self.samples.append((ref, digest))
        if len(self.samples) == 2 * COMPARED:
            self.samples = self.samples[::2]
            self._stride *= 2

    @contextmanager
    def _growing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise scratch_full(self._folder.path, error) from error


def _encoded(key: str) -> bytes:
    # A blob: SQLite's text would end at a NUL, and cannot hold what is not Unicode.
    return key.encode("utf-8", "surrogatepass")
