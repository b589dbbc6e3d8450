"""Where a label set's files lie: in a folder, or on a server and in a cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ferkd_data.errors import RemoteError, ShardError
from ferkd_data.manifest import FileEntry
from ferkd_data.remote import Remote
from ferkd_data.shard_cache import ShardCache
from ferkd_data.storage import OpenFile, inside, sha256_once


class Files(Protocol):
    """Where a label set's files lie. Can be pickled."""

    @property
    def location(self) -> str: ...

    def open(self, entry: FileEntry, *, check: bool) -> OpenFile:
        """Open a file on this host that has the size of the manifest and, with `check`, its SHA-256.

        A process hashes a file once, and again only after the file changed. Raises LabelSetError, RemoteError.
        """


@dataclass(frozen=True)
class LocalFiles:
    folder: Path

    @property
    def location(self) -> str:
        return str(self.folder)

    def check_size(self, entry: FileEntry) -> None:
        """Raises ShardError where the file is missing, or has another size than the manifest says."""
        path = self.folder / entry.path
        try:
            size = path.stat().st_size
        except OSError as error:
            raise _cannot_be_opened(path, error) from error
        if size != entry.bytes:
            raise _of_another_size(path, size, entry)

    def open(self, entry: FileEntry, *, check: bool = True) -> OpenFile:
        path = inside(self.folder, entry.path)
        try:
            file = OpenFile(path)
        except OSError as error:
            raise _cannot_be_opened(path, error) from error
        if file.size != entry.bytes:
            raise _of_another_size(path, file.size, entry)
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
    remote: Remote
    cache: ShardCache

    @property
    def location(self) -> str:
        return self.remote.url

    def open(self, entry: FileEntry, *, check: bool = True) -> OpenFile:
        """A file that was damaged in the cache is fetched again."""
        file = self.cache.fetch(self.remote, entry)
        if not check or sha256_once(file) == entry.sha256:
            return file
        # Whoever has the damaged file open or mapped keeps it; nobody finds it any more.
        file.path.unlink(missing_ok=True)
        file.close()
        file = self.cache.fetch(self.remote, entry)
        if sha256_once(file) != entry.sha256:
            raise RemoteError(
                f"{file.path}: the cache does not keep what is written to it (SHA-256 differs, twice); check its disk, "
                "or choose another place with cache_dir or FERKD_DATA_CACHE"
            )
        return file
