"""Names that folders and archives of images have beside the images: of systems, of splits.

Which keys came before, for listings of any length.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from types import TracebackType

from ferkd_data import rng
from ferkd_data.errors import StorageFullError
from ferkd_data.scratch import Scratch

SYSTEM_NAMES = frozenset(
    {
        ".ds_store",
        ".appledouble",
        ".lsoverride",
        ".spotlight-v100",
        ".trashes",
        ".fseventsd",
        ".temporaryitems",
        ".documentrevisions-v100",
        ".directory",
        ".ipynb_checkpoints",
        ".git",
        ".gitattributes",
        ".gitignore",
        ".svn",
        ".hg",
        ".cache",
        "__macosx",
        "__pycache__",
        "thumbs.db",
        "thumbs.db:encryptable",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "lost.dir",
        "@eadir",
        "@tmp",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        ".snapshot",
        ".snapshots",
        ".zfs",
    }
)
"""Files and folders that systems, file servers and tools leave among images, in lower case."""
SYSTEM_STARTS = ("._", ".trash-", ".nfs", ".fuse_hidden", ".synologyworkingdirectory")
SPLITS = {
    "train": ("train", "training", "trainset"),
    "validation": ("val", "valid", "validation", "dev", "eval", "valset"),
    "test": ("test", "testing", "testset"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}
SPLIT_FOLDER = re.compile(
    rf"({'|'.join(sorted(SPLIT_OF_WORD, key=len, reverse=True))})([-_. ]?(set|data|images?|imgs|split|\d+))*"
)
HUGGING_FACE_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}")


def skip_reason(name: str) -> str | None:
    """`system` or `hidden` for a file or folder that is never an image or a class, else None."""
    lower = name.lower()
    if lower in SYSTEM_NAMES or lower.startswith(SYSTEM_STARTS):
        return "system"
    return "hidden" if name.startswith(".") else None


def skip_reason_of_path(path: str) -> str | None:
    """The same for a path with forward slashes, by any of its parts."""
    parts = (part for part in path.split("/") if part not in ("", ".", ".."))
    return next(filter(None, map(skip_reason, parts)), None)


def split_of_folder(name: str) -> str | None:
    """train, validation or test for a folder that is named after one, such as `val2017`, else None."""
    found = SPLIT_FOLDER.fullmatch(name.lower())
    return SPLIT_OF_WORD[found[1]] if found else None


def split_of_file(path: str) -> str | None:
    """The split that a shard's path names: `train` of data/train-00000-of-00005.parquet, else None."""
    pure = PurePosixPath(path)
    stem = pure.name.partition(".")[0]
    by_words = _split_in(stem)
    if by_words is None and (found := HUGGING_FACE_FILE.fullmatch(stem)):
        return found[1]
    return by_words or next(filter(None, map(split_of_folder, reversed(pure.parts[:-1]))), None)


def splits_of_files(paths: Iterable[str]) -> dict[str, list[str]]:
    """Split -> its files; those that name none are under the empty string."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(split_of_file(path) or "", []).append(path)
    return found


def _split_in(stem: str) -> str | None:
    return next((SPLIT_OF_WORD[word] for word in re.split(r"[^a-z]+", stem.lower()) if word in SPLIT_OF_WORD), None)


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
