"""Which keys came before, for listings of any length."""

from __future__ import annotations

import sqlite3
import tempfile
from types import TracebackType

from ferkd_data import rng
from ferkd_data.errors import StorageFullError

CACHE_KIB = 64 * 1024


class DuplicateFilter:
    """A set of keys on disk (their 128-bit hashes in SQLite), with at most 64 MiB in memory."""

    def __enter__(self) -> DuplicateFilter:
        self._folder = tempfile.TemporaryDirectory(prefix="ferkd-data-keys-")
        self._database = sqlite3.connect(f"{self._folder.name}/keys.sqlite", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._database.execute("CREATE TABLE keys (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self._folder.cleanup()

    def seen(self, key: str) -> bool:
        """Whether `key` was asked for before. Raises StorageFullError."""
        try:
            cursor = self._database.execute("INSERT OR IGNORE INTO keys VALUES (?)", (rng.digest(key),))
        except sqlite3.OperationalError as error:
            raise StorageFullError(
                f"{self._folder.name}: the list of keys cannot grow ({error}); free some space there, "
                "or set TMPDIR to a folder that has it, and run the same command again"
            ) from error
        return cursor.rowcount == 0
