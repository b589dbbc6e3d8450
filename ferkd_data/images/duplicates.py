"""Which keys came before, for listings of any length."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from types import TracebackType

from ferkd_data import rng
from ferkd_data.errors import StorageFullError
from ferkd_data.scratch import Scratch

CACHE_KIB = 64 * 1024


def scratch_full(folder: Path, error: Exception) -> StorageFullError:
    return StorageFullError(
        f"{folder}: the list of keys cannot grow ({error}); free some space there, "
        "or set TMPDIR to a folder that has it, and run the same command again"
    )


class DuplicateFilter:
    """A set of keys, their 128-bit hashes: in a temporary folder, with at most 64 MiB in memory; a context."""

    def __enter__(self) -> DuplicateFilter:
        self._folder = Scratch("keys")
        self._database = sqlite3.connect(f"{self._folder.path}/keys.sqlite", isolation_level=None)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KIB}"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE keys (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self._folder.remove()

    def seen(self, key: str) -> bool:
        """Whether `key` was asked for before. Raises StorageFullError."""
        try:
            found = self._database.execute("INSERT OR IGNORE INTO keys VALUES (?)", (rng.digest(key),))
        except sqlite3.OperationalError as error:
            raise scratch_full(self._folder.path, error) from error
        return found.rowcount == 0
