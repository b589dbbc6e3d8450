"""Which keys came before, for listings of any length."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from ferkd_data import rng
from ferkd_data.errors import StorageFullError

CACHE_KIB = 64 * 1024


class ScratchTables:
    """SQLite tables in a temporary folder, with at most 64 MiB in memory; gone when the context ends."""

    def __init__(self, *tables: str) -> None:
        self._tables = tables

    def __enter__(self) -> ScratchTables:
        self._folder = tempfile.TemporaryDirectory(prefix="ferkd-data-keys-")
        self._database = sqlite3.connect(f"{self._folder.name}/keys.sqlite", isolation_level=None)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KIB}"):
            self._database.execute(f"PRAGMA {pragma}")
        for table in self._tables:
            self._database.execute(f"CREATE TABLE {table}")
        self._database.execute("BEGIN")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self._folder.cleanup()

    def run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """Raises StorageFullError."""
        try:
            return self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise self._full(error) from error

    def run_many(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Raises StorageFullError."""
        try:
            self._database.executemany(statement, rows)
        except sqlite3.OperationalError as error:
            raise self._full(error) from error

    def _full(self, error: sqlite3.OperationalError) -> StorageFullError:
        return StorageFullError(
            f"{self._folder.name}: the list of keys cannot grow ({error}); free some space there, "
            "or set TMPDIR to a folder that has it, and run the same command again"
        )


class DuplicateFilter:
    """A set of keys on disk: their 128-bit hashes."""

    def __enter__(self) -> DuplicateFilter:
        self._tables = ScratchTables("keys (hash BLOB PRIMARY KEY) WITHOUT ROWID").__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tables.__exit__(kind, error, trace)

    def seen(self, key: str) -> bool:
        """Whether `key` was asked for before. Raises StorageFullError."""
        return self._tables.run("INSERT OR IGNORE INTO keys VALUES (?)", rng.digest(key)).rowcount == 0
