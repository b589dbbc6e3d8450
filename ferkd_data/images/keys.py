"""Check the keys of images: fit for both layouts, and each once in a listing of any length."""

from __future__ import annotations

import sqlite3
import unicodedata
from pathlib import Path
from types import TracebackType

from ferkd_data import rng
from ferkd_data.errors import ImageError, StorageFullError
from ferkd_data.scratch import Scratch

MAX_KEY_BYTES = 1024
CACHE_KIB = 64 * 1024
"""Memory that the database of keys may use."""


def check_key(key: str) -> None:
    """Raise ImageError("bad_key") for a key that would not survive in both layouts."""
    problem = _key_problem(key)
    if problem:
        raise ImageError("bad_key", f"{key!r} {problem}")


def _key_problem(key: str) -> str | None:
    components = key.split("/")
    base = components[-1]
    if not all(components):
        return "is empty, absolute, or has an empty component"
    if "." in base:
        return "has a dot in its last component, where WebDataset would cut it; rename the file"
    if any(component in (".", "..") for component in components):
        return "climbs out of its folder"
    if base.startswith("__") and base.endswith("__"):
        return "is a name that WebDataset keeps for itself"
    # Printable text has no control character, and `isprintable` is much faster than looking up categories.
    if "\\" in key or (not key.isprintable() and any(unicodedata.category(character) == "Cc" for character in key)):
        return "has a backslash or a control character"
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        return "is not UTF-8"
    return f"has {size} bytes; at most {MAX_KEY_BYTES}" if size > MAX_KEY_BYTES else None


def scratch_full(folder: Path, error: Exception) -> StorageFullError:
    """Make the error for a temporary folder without room for more keys."""
    return StorageFullError(
        f"{folder}: the list of keys cannot grow ({error}); free some space there, "
        "or set TMPDIR to a folder that has it, and run the same command again"
    )


class DuplicateFilter:
    """Recognise keys that were seen before, in a listing of any length.

    Keys are stored as 128-bit hashes in a database in a temporary folder; at most 64 MiB of it are in memory. A context
    manager: the folder is removed at the end.
    """

    def __enter__(self) -> DuplicateFilter:
        self._folder = Scratch("keys")
        # isolation_level None: this class begins the one transaction itself. It is never committed.
        self._database = sqlite3.connect(f"{self._folder.path}/keys.sqlite", isolation_level=None)
        # The database lives as long as this object, so it needs neither a journal nor its pages on disk.
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
        """Return whether `key` was passed before, and remember it. Raises StorageFullError."""
        try:
            # 128 bits: among a billion keys, two different ones have the same hash with a probability of 1e-21.
            found = self._database.execute("INSERT OR IGNORE INTO keys VALUES (?)", (rng.digest(key),))
        except sqlite3.OperationalError as error:
            raise scratch_full(self._folder.path, error) from error
        return found.rowcount == 0
