"""Shards of remote label sets on this host: fetched once, checked once, bounded in size, shared by all processes.

A file is named by its SHA-256, so label sets that share files share them here, and a name is a promise kept at arrival.
The least recently used files go first; what was used within `GRACE_SECONDS` stays, since somebody may be opening it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ferkd_data.errors import StorageFullError
from ferkd_data.manifest import FileEntry
from ferkd_data.remote import Remote, part_of

DEFAULT_BYTES = 50 * 10**9
GRACE_SECONDS = 60.0
LOCKS = "locks"


@dataclass(frozen=True)
class ShardCache:
    folder: Path
    limit: int = DEFAULT_BYTES
    """Bytes that may be kept; what is in use at once may exceed it."""

    def fetch(self, remote: Remote, entry: FileEntry) -> Path:
        """The file, on this host. Raises RemoteError, StorageFullError when the disk is full."""
        path = self.folder / entry.sha256[:2] / (entry.sha256 + PurePosixPath(entry.path).suffix)
        if not _touch(path):
            with _locked(self.folder / LOCKS / entry.sha256[:3]):
                if not _touch(path):
                    self._make_room(entry.bytes, keep=path)
                    remote.download(entry.path, path, size=entry.bytes, sha256=entry.sha256)
        return path

    def _make_room(self, wanted: int, keep: Path) -> None:
        """Remove the least recently used files until `wanted` bytes more stay within the limit."""
        with _locked(self.folder / LOCKS / "all"):
            files = sorted(self._files(), key=lambda file: file[1])
            total = sum(size for _, _, size in files) + wanted
            young = time.time() - GRACE_SECONDS
            for path, used, size in files:
                if total <= self.limit:
                    break
                if used < young and path != part_of(keep):
                    path.unlink(missing_ok=True)
                    total -= size
        free = shutil.disk_usage(self.folder).free
        if free < wanted:
            raise StorageFullError(
                f"{self.folder}: {wanted} bytes are needed for a shard, {free} are free; make room, or choose another "
                "place with cache_dir or FERKD_DATA_CACHE"
            )

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        for path in self.folder.glob("??/*"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            yield path, stat.st_mtime, stat.st_size
        for path in self.folder.glob("??/.*.part"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            yield path, stat.st_mtime, stat.st_size


def _touch(path: Path) -> bool:
    """Mark a file as used now; False where it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
