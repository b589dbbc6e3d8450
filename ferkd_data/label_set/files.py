"""Where a label set's files lie: in a folder, or on a server and in a cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ferkd_data.errors import ShardError
from ferkd_data.manifest import FileEntry
from ferkd_data.remote import Remote
from ferkd_data.shard_cache import ShardCache
from ferkd_data.storage import OpenFile, inside


class Files(Protocol):
    """Where a label set's files lie. Can be pickled."""

    @property
    def location(self) -> str: ...

    def open(self, entry: FileEntry) -> OpenFile:
        """The file on this host, of the size that the manifest says. Raises LabelSetError, RemoteError."""


@dataclass(frozen=True)
class LocalFiles:
    folder: Path

    @property
    def location(self) -> str:
        return str(self.folder)

    def open(self, entry: FileEntry) -> OpenFile:
        path = inside(self.folder, entry.path)
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise ShardError(f"{path}: the shard is missing; restore it or build the label set again") from error
        if not path.is_file():
            raise ShardError(f"{path}: is not a regular file")
        if size != entry.bytes:
            raise ShardError(f"{path}: {size} bytes, the manifest says {entry.bytes}; fetch or build it again")
        return OpenFile(path)


@dataclass(frozen=True)
class CachedFiles:
    remote: Remote
    cache: ShardCache

    @property
    def location(self) -> str:
        return self.remote.url

    def open(self, entry: FileEntry) -> OpenFile:
        return self.cache.fetch(self.remote, entry)
