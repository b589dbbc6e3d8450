"""The files of labelled shards, and a record for each: below a folder, or in a store (see store_files.py)."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from ferkd_data.errors import BuildError
from ferkd_data.format.manifest import BlockEntry, Manifest
from ferkd_data.images import Reject
from ferkd_data.labels.statistics import Statistics
from ferkd_data.storage import sha256_file, write_atomically

# Of the files in .build/. It is compared like a setting: another version of ferkd-data does not go on with them.
STATE_VERSION = 1
FOLDER = ".build"


class ShardRecord(BaseModel):
    """The record of a finished shard."""

    model_config = ConfigDict(frozen=True)

    version: int = STATE_VERSION
    index: int
    rows: int
    files: tuple[BlockEntry, ...]
    rejects: tuple[Reject, ...]
    statistics: Statistics
    thresholds: tuple[float, float, float]
    """Thresholds (low, mid, top) of the stored buckets."""
    successors: tuple[BlockEntry, ...] = ()
    """While the shard is written anew: the files that replace `files`, one for each of them. A kill leaves the old or
    the new one under the same name; both hold the same probabilities."""

    def either(self) -> Iterator[tuple[BlockEntry, BlockEntry]]:
        """Yield the two entries of each file, one of which is true of the present file."""
        return zip(self.files, self.successors or self.files, strict=True)


class ShardFiles(Protocol):
    """The files of labelled shards and a record for each, on a disk or in a store."""

    @property
    def location(self) -> Path | str:
        """OUT as the user names it: a folder or a URL."""

    def join(self) -> None:
        """See what the driver has prepared, from any host. Raises BuildError where it cannot be seen."""

    def share(self) -> None:
        """Let other hosts see the settings, the facts and the plan."""

    def record(self, shard: int) -> ShardRecord | None:
        """Return the record of a finished shard whose files are all there; None where it has to be labelled."""

    def records(self, shards: Iterable[int]) -> Iterator[tuple[int, ShardRecord | None]]:
        """Yield each shard with its `record`."""

    def save(self, record: ShardRecord) -> None:
        """Save the record of a shard whose files are written."""

    def announce(self, record: ShardRecord) -> None:
        """Save the record of a shard whose files are about to be replaced by their successors."""

    def at_hand(self, record: ShardRecord) -> AbstractContextManager[None]:
        """Have the files of a shard on this host's disk while the context lasts. Raises BuildError for damaged ones."""

    def look_again(self) -> None:
        """Make files visible that another host has just written, where that takes a request."""

    def commit(self, manifest: Manifest) -> None:
        """Put the rejects and the manifest in place: from now on, OUT is a label set."""

    def forget(self) -> None:
        """Remove the state of the build from where other hosts see it."""

    def remove(self) -> None:
        """Remove the state of a build that has ended."""


class DiskFiles:
    """Files below a folder of this host, or of a file system that all hosts share."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / FOLDER

    @property
    def location(self) -> Path | str:
        return self.out

    def join(self) -> None:
        if not self.path.is_dir():
            raise BuildError(
                f"node {platform.node()} does not see {self.out}; OUT has to be on a file system that all share, "
                "or in a store"
            )

    def share(self) -> None:
        pass

    def record(self, shard: int) -> ShardRecord | None:
        path = self.record_path(shard)
        if not path.exists():
            return None
        record = ShardRecord.model_validate_json(path.read_bytes())
        # Sizes alone: hashing every file would make each resume read the whole label set. Damage is for `verify` to
        # find.
        whole = all(_size(self.out / old.path) in (old.bytes, new.bytes) for old, new in record.either())
        return record if whole else None

    def records(self, shards: Iterable[int]) -> Iterator[tuple[int, ShardRecord | None]]:
        return ((shard, self.record(shard)) for shard in shards)

    def save(self, record: ShardRecord) -> None:
        with write_atomically(self.record_path(record.index)) as aside:
            aside.write_text(record.model_dump_json())

    def announce(self, record: ShardRecord) -> None:
        self.save(record)

    @contextmanager
    def at_hand(self, record: ShardRecord) -> Iterator[None]:
        # Whatever is read here is written again under new digests, so damage must be found now.
        self.files_now(record)
        yield

    def files_now(self, record: ShardRecord) -> tuple[BlockEntry, ...]:
        """Return the entries that are true of a shard's present files. Raises BuildError for a damaged file."""
        return tuple(self._entry_now(old, new) for old, new in record.either())

    def look_again(self) -> None:
        # Listing a folder makes a network file system forget the names that it remembers as missing.
        for path in (self.path / "shards", self.out / "labels", self.out / "shards"):
            list(path.rglob("*"))

    def commit(self, manifest: Manifest) -> None:
        pass

    def forget(self) -> None:
        pass

    def remove(self) -> None:
        shutil.rmtree(self.path)

    def record_path(self, shard: int) -> Path:
        return self.path / "shards" / f"{shard:05d}.json"

    def _entry_now(self, old: BlockEntry, new: BlockEntry) -> BlockEntry:
        path = self.out / old.path
        digest = sha256_file(path)
        for entry in (old, new):
            if entry.sha256 == digest:
                return entry
        raise BuildError(
            f"{path}: was damaged or changed since it was written (its SHA-256 differs); remove it and run the build "
            "command again, which labels this shard anew"
        )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None
