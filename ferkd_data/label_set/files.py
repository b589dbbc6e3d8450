"""The files of label sets on this host: in a folder, or fetched from a server into a bounded cache.

A fetched file is named by its SHA-256 and checked when it arrives, so label sets that share files share them here. The
least recently used files go first. A file that any process has open stays: whoever opens one holds a shared lock on
it, which ends with the process however that ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from ferkd_data.errors import LabelSetError, LoaderError, RemoteError, ShardError, StorageFullError
from ferkd_data.format.manifest import FileEntry
from ferkd_data.locks import lock, locked_for_cache
from ferkd_data.remote import Remote
from ferkd_data.storage import OpenFile, inside, sha256_once

DEFAULT_BYTES = 50 * 10**9
LEFTOVER_SECONDS = 3600.0
"""Age at which a half-written file counts as abandoned."""
LOCKS = "locks"
MIN_ROOM = 2**24
"""Least number of bytes to free when the disk is full."""
ATTEMPTS = 3
"""Tries to make a file that somebody else removes each time."""


@dataclass(frozen=True)
class ShardCache:
    """A folder of files by name, shared by all processes of this host, that holds about `limit` bytes."""

    folder: Path
    limit: int = DEFAULT_BYTES
    """Bytes to keep; files that are open at the same time may exceed it."""

    def fetch(self, remote: Remote, entry: FileEntry) -> OpenFile:
        """Open a file of a label set, fetched if need be. Raises RemoteError, and what `open` raises."""

        def download(path: Path) -> None:
            remote.download(entry.path, path, size=entry.bytes, sha256=entry.sha256)

        # The suffix tells readers the kind of file, and locks apart (see `open`).
        return self.open(entry.sha256 + PurePosixPath(entry.path).suffix, entry.bytes, download)

    def path(self, name: str) -> Path:
        # Two hexadecimal digits make 256 folders, so that none grows too large to list quickly.
        return self.folder / name[:2] / name

    def open(self, name: str, size: int, make: Callable[[Path], None]) -> OpenFile:
        """Open the file of this name; `make` writes it where there is none of this size.

        A name determines the content. One lock for each name's first digits and suffix keeps processes from making a
        file twice. While it makes a file, `make` may open files of another suffix, as long as the order of suffixes
        has no cycle (otherwise two processes could wait for each other).

        `size` is a claim until the file is there, so no other file is removed for it before. When the disk fills up,
        files are removed for the bytes that were written, and `make` is called again: it must continue or begin anew.

        Raises LoaderError where the folder cannot be written to, StorageFullError when there is no room.
        """
        path = self.path(name)
        # Without the lock first: a file that is there costs no process a wait.
        found = _open(path, size)
        if found is None:
            with locked_for_cache(self.folder / LOCKS / (name[:3] + path.suffix)):
                for _ in range(ATTEMPTS):
                    if (found := _open(path, size)) is not None:
                        return found
                    # Before anything is fetched, in the light of what could be removed.
                    self._check_room(size)
                    self._make(path, make)
                    if (found := _open(path, size)) is not None:
                        # Open, and so locked: neither this process nor another one removes it to keep the limit.
                        self._keep_limit()
                        return found
                raise LoaderError(f"{path}: cannot be kept in the cache; does something else remove its files?")
        return found

    def _check_room(self, wanted: int) -> None:
        """Raise StorageFullError where `wanted` bytes would not fit even if all other files were removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        # The files are only added up where the free space alone does not do.
        if free < wanted and free + sum(size for _, _, size in self._files()) < wanted:
            raise self._no_room(wanted, free)

    def _make(self, path: Path, make: Callable[[Path], None]) -> None:
        """Call `make`, and again each time that the disk was full and files could be removed."""
        while True:
            try:
                return make(path)
            except StorageFullError:
                # Free as much as has arrived: files go for bytes that exist, not for a claimed size.
                written = sum(file.stat().st_size for file in _unfinished(path))
                if not self._remove_oldest(max(written, MIN_ROOM)):
                    raise

    def _keep_limit(self) -> None:
        over = sum(size for _, _, size in self._files()) - self.limit
        if over > 0:
            self._remove_oldest(over)

    def _remove_oldest(self, wanted: int) -> int:
        """Remove `wanted` bytes of files that nobody has open, least recently used first; return the bytes freed."""
        freed = 0
        # One process at a time removes: two would each free the bytes that one needs.
        with locked_for_cache(self.folder / LOCKS / "all"):
            for path, used, size in sorted(self._files(), key=lambda file: file[1]):
                if freed >= wanted:
                    break
                if _remove(path, used):
                    freed += size
        return freed

    def _no_room(self, wanted: int, free: int) -> StorageFullError:
        return StorageFullError(
            f"{self.folder}: {wanted} bytes are needed for a shard, {free} are free; make room, or choose another "
            "place with cache_dir or FERKD_DATA_CACHE"
        )

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        """Yield (path, time of last use, bytes) of all files, half-written ones too."""
        for folder in self.folder.glob("??"):
            for path in folder.iterdir():
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                yield path, stat.st_mtime, stat.st_size


def _open(path: Path, size: int) -> OpenFile | None:
    """Open a file, mark it as used now and lock it; None where it is missing or has another size."""
    try:
        file = OpenFile(path)
        # Marks the file as used now. Access times would not do: most disks are mounted with relatime or noatime.
        os.utime(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except LabelSetError:
        # Not a regular file, so not one of ours.
        path.unlink(missing_ok=True)
        return None
    # From here on no process removes it: removing needs the exclusive lock (`_remove`).
    lock(file.descriptor, fcntl.LOCK_SH)
    found = os.fstat(file.descriptor)
    # No link is left where it was removed between opening and locking.
    if found.st_nlink and found.st_size == size:
        return file
    if found.st_nlink:
        path.unlink(missing_ok=True)
    return None


def _unfinished(path: Path) -> Iterator[Path]:
    """Return the unfinished files beside a file that is being made; see `part_of` and `write_atomically`."""
    return path.parent.glob(f".{path.name}.*")


def _remove(path: Path, used: float) -> bool:
    """Remove a file that nobody has open; False where somebody has it open or is writing it."""
    # Unfinished: its writer may be alive. By its age alone, since nobody locks such files.
    if path.name.startswith("."):
        if used > time.time() - LEFTOVER_SECONDS:
            return False
        path.unlink(missing_ok=True)
        return True
    try:
        with OpenFile(path) as file:
            if not lock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) and used > time.time() - LEFTOVER_SECONDS:
                # Without locks, whether it is open cannot be known: only an old file goes.
                return False
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


class Files(Protocol):
    """Access to a label set's files. Can be pickled."""

    @property
    def location(self) -> str: ...

    def open(self, entry: FileEntry, *, check: bool) -> OpenFile:
        """Open a file on this host: it has the size of the manifest and, with `check`, its SHA-256.

        A process hashes a file once, and again only after the file changed. Raises LabelSetError, RemoteError.
        """


@dataclass(frozen=True)
class LocalFiles:
    """The files of a label set in a folder."""

    folder: Path

    @property
    def location(self) -> str:
        return str(self.folder)

    def check_size(self, entry: FileEntry) -> None:
        """Raise ShardError where the file is missing, or has another size than the manifest says."""
        path = self.folder / entry.path
        try:
            size = path.stat().st_size
        except OSError as error:
            raise _cannot_be_opened(path, error) from error
        if size != entry.bytes:
            raise _of_another_size(path, size, entry)

    def open(self, entry: FileEntry, *, check: bool = True) -> OpenFile:
        # The manifest is a stranger's: no path of it may lead out of the folder, also through a link (invariant 6).
        path = inside(self.folder, entry.path)
        try:
            file = OpenFile(path)
        except OSError as error:
            raise _cannot_be_opened(path, error) from error
        # The size first, which costs nothing and explains a file that was cut short better than a digest does.
        if file.size != entry.bytes:
            raise _of_another_size(path, file.size, entry)
        # Hashed before anything parses it: damaged bytes never reach Arrow or NumPy.
        if check and sha256_once(file) != entry.sha256:
            raise ShardError(
                f"{path}: the bytes are not those of the manifest (SHA-256 differs): the file was damaged or changed; "
                "fetch or build it again"
            )
        return file


def _cannot_be_opened(path: Path, error: OSError) -> ShardError:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return ShardError(f"{path}: the shard is missing; restore it or build the label set again")
    return ShardError(f"{path}: cannot be opened ({error.strerror})")


def _of_another_size(path: Path, size: int, entry: FileEntry) -> ShardError:
    return ShardError(f"{path}: {size} bytes, the manifest says {entry.bytes}; fetch or build it again")


@dataclass(frozen=True)
class CachedFiles:
    """The files of a label set on a server, through a cache."""

    remote: Remote
    cache: ShardCache

    @property
    def location(self) -> str:
        return self.remote.url

    def open(self, entry: FileEntry, *, check: bool = True) -> OpenFile:
        """Open a file; one that was damaged in the cache is fetched again."""
        file = self.cache.fetch(self.remote, entry)
        if not check or sha256_once(file) == entry.sha256:
            return file
        # Processes that have the damaged file open or mapped keep it; later ones find a new file.
        file.path.unlink(missing_ok=True)
        file.close()
        file = self.cache.fetch(self.remote, entry)
        if sha256_once(file) != entry.sha256:
            raise RemoteError(
                f"{file.path}: the cache does not keep what is written to it (SHA-256 differs, twice); check its disk, "
                "or choose another place with cache_dir or FERKD_DATA_CACHE"
            )
        return file
