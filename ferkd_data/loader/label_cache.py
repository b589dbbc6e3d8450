"""A crop block as one memory-mapped file of fixed-size records, so that labels can be read at random.

Legend: N crops of a block, k kept classes.

A global shuffle touches every shard at once. The block is unpacked once for all workers and ranks of a host, into
`block-BBB.npy` under a folder named by the label set's digest, written aside and renamed.

Many processes use a cache at once, and any of them may be killed at any time. Who unpacks or removes holds the
folder's lock; who has a block open holds a shared lock on its file, and it is not removed. Where the file system has
no locks, everything works all the same, but a block may be unpacked by several at once, and stays for a day.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.errors import LabelSetError, LoaderError, TooManyOpenFilesError
from ferkd_data.label_set import LabelSet
from ferkd_data.labels.rows import ShardLabels, class_index_dtype
from ferkd_data.locks import lock, locked_for_cache
from ferkd_data.storage import (
    FREE_CACHE,
    OpenFile,
    explain_full_disk,
    remove_leftovers,
    write_atomically,
)
from ferkd_data.threads import look_ahead

UNVERIFIED = "-unverified"
"""Ending of names in the cache where the files' digests were not compared (verify_labels="never")."""
CHECKSUM = "crc32"
"""The last field of a record."""
Records = npt.NDArray[np.void]
LOCATION_FIELDS = ("image_offset", "image_bytes")
"""Fields that locate an image in its shard's tar, in layout webdataset."""


def record_dtype(labels: LabelSet, block: int) -> np.dtype[np.void]:
    """Return the type of a record: the labels of one image in this crop block, and where its bytes lie."""
    manifest = labels.manifest
    num_crops, top_k = manifest.block_crops(block), manifest.top_k
    return np.dtype(
        [
            ("key_hash", "<u8"),
            ("image_digest", "u1", (16,)),
            ("height", "<u2"),
            ("width", "<u2"),
            ("target", "<i4"),
            ("boxes", "<u2", (num_crops, 4)),
            ("class_index", class_index_dtype(manifest.num_classes), (num_crops, top_k)),
            ("class_prob", "<f2", (num_crops, top_k)),
            ("target_prob", "<f2", (num_crops,)),
            ("flip", "?", (num_crops,)),
            ("bucket", "u1", (num_crops,)),
            ("operations", "<u2", (num_crops, manifest.operation_words)),
            *((name, "<i8") for name in LOCATION_FIELDS if manifest.layout == "webdataset"),
            (CHECKSUM, "<u4"),
        ]
    )


def fill(part: Records, rows: ShardLabels, labels: LabelSet, shard: int) -> None:
    """Write `rows`, a crop block of one shard, into `part` of as many records. Raises ShardError, RemoteError."""
    part["key_hash"] = rng.hashes64(rows.keys)
    if labels.manifest.layout == "webdataset":
        for name, values in zip(LOCATION_FIELDS, labels.image_locations(shard).T, strict=True):
            part[name] = values
    for name in part.dtype.names or ():
        if name not in ("key_hash", CHECKSUM, *LOCATION_FIELDS):
            part[name] = getattr(rows, name)
    # Last: it covers all other fields.
    part[CHECKSUM] = _checksums(part)


def are_intact(records: Records) -> bool:
    """Return whether these records are what `fill` wrote: a disk may return something else."""
    return bool((_checksums(records) == records[CHECKSUM]).all())


def _checksums(records: Records) -> npt.NDArray[np.uint32]:
    """CRC-32 of each record up to its checksum: any flipped bit changes it."""
    size = records.dtype.itemsize
    # Rows taken from a map are a copy, and contiguous already.
    content = np.ascontiguousarray(records).view(np.uint8).data
    ends = range(size, len(content) + 1, size)
    return np.fromiter((zlib.crc32(content[end - size : end - 4]) for end in ends), np.uint32, len(records))


log = logging.getLogger("ferkd_data.loader")

FETCH_AHEAD = 4
"""Files of a remote label set that are fetched at once."""
STALE_SECONDS = 86400.0
"""Seconds after which a file that was not opened counts as unused, where there are no locks."""


def taken_intact(take: Callable[[], Records], discard: Callable[[], None], path: Path) -> Records:
    """Take records that a file at `path` maps, each compared with its checksum. Raises LoaderError.

    A map shows what the disk returns now, and bits may rot after the file was written: it is discarded and made again
    once.
    """
    found = take()
    if are_intact(found):
        return found
    log.warning("%s: damaged on its disk; made again", path)
    discard()
    found = take()
    if not are_intact(found):
        raise LoaderError(f"{path}: damaged again right after it was written; is the disk failing?")
    return found


class LabelCache:
    """Blocks of one label set, unpacked when first asked for. Can be pickled: each process maps files for itself."""

    def __init__(self, labels: LabelSet, cache_dir: Path) -> None:
        self.labels = labels
        # A folder of its own for what no digest was compared of: others, who want that, would find it unpacked.
        self.folder = cache_dir / (labels.identity[:32] + ("" if labels.is_verified else UNVERIFIED))
        self._open: dict[int, _OpenBlock] = {}

    def take(self, block: int, rows: npt.NDArray[np.int64]) -> Records:
        """Return the records of these rows, each compared with its checksum."""
        return taken_intact(lambda: self.block(block)[rows], lambda: self._discard(block, rows), self._path(block))

    def prepare(self, blocks: set[int]) -> None:
        """Unpack blocks before workers ask for them, and drop the others."""
        for block in sorted(blocks):
            self.block(block)
        # After the others are unpacked: where that fails, nothing was removed.
        self.drop_except(blocks)

    def block(self, block: int) -> Records:
        """Return the records of all rows, read-only and memory-mapped, (images,); unpack the block where needed.

        Raises ShardError for a damaged shard, StorageFullError when the cache's disk is full, LoaderError where the
        cache cannot be written to.
        """
        if block not in self._open:
            found = self._load(self._path(block), block)
            if found is None:
                # Looked for again under the lock: another process may have unpacked it while this one waited.
                with locked_for_cache(self._lock) as locked:
                    found = self._load(self._path(block), block) or self._unpack(block, locked)
            self._open[block] = found
        return self._open[block].records

    def forget_except(self, blocks: set[int]) -> None:
        """Close other blocks; a process that goes on to the next block does not keep the file of the last one."""
        self._open = {block: opened for block, opened in self._open.items() if block in blocks}

    def drop_except(self, blocks: set[int]) -> None:
        """Forget other blocks, and remove the files of those that no process has open."""
        self.forget_except(blocks)
        paths = [self.folder / f"block-{number:03d}.npy" for number in range(self.labels.num_blocks)]
        others = [path for number, path in enumerate(paths) if number not in blocks and path.exists()]
        if not others:
            return
        try:
            with locked_for_cache(self._lock):
                for path in others:
                    _remove_unused(path)
        except (OSError, LoaderError, TooManyOpenFilesError) as error:
            # A cache that is shared and may only be read serves as well.
            log.info("%s: other crop blocks stay there (%s)", self.folder, error)

    @property
    def _lock(self) -> Path:
        return self.folder / "lock"

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:03d}.npy"

    def _discard(self, block: int, rows: npt.NDArray[np.int64]) -> None:
        """Remove a block's file, unless another process has replaced it already."""
        del self._open[block]
        with locked_for_cache(self._lock):
            found = self._load(self._path(block), block)
            if found is not None and not are_intact(found.records[rows]):
                self._path(block).unlink(missing_ok=True)

    def _load(self, path: Path, block: int) -> _OpenBlock | None:
        """Open a block; None where its file is missing, short, or of another kind."""
        try:
            file = OpenFile(path)
            # Held as long as the records are referred to: other processes see that the block is in use.
            lock(file.descriptor, fcntl.LOCK_SH)
            # Removed between opening and locking: nobody else would find this file, so it is unpacked again.
            if not os.fstat(file.descriptor).st_nlink:
                return None
            # The time of last use, by which `_remove_unused` judges where there are no locks. A shared cache may be
            # read-only.
            with suppress(OSError):
                os.utime(path)
            return _opened(file, record_dtype(self.labels, block), len(self.labels))
        except (OSError, ValueError, LabelSetError):
            return None

    def _unpack(self, block: int, locked: bool) -> _OpenBlock:
        # Under the lock, no process is writing here, so that every unfinished file is a dead one's.
        remove_leftovers(self.folder, older_than=0.0 if locked else STALE_SECONDS)
        path, dtype = self._path(block), record_dtype(self.labels, block)
        # `write_atomically` replaces files alone; a FIFO that lies in a cache is only in the way.
        if path.exists() and not path.is_file():
            path.unlink()
        with write_atomically(path, advice=FREE_CACHE) as aside, explain_full_disk(aside, FREE_CACHE):
            header = _header(dtype, len(self.labels))
            with aside.open("wb") as stream:
                stream.write(header)
                # A sparse file: it takes no space yet.
                stream.truncate(len(header) + len(self.labels) * dtype.itemsize)
                stream.flush()
                # Written through a map, shard by shard: the block is larger than memory may be.
                records = np.memmap(aside, dtype, "r+", len(header), (len(self.labels),))
                for shard in self._fetched_ahead(block):
                    first = int(self.labels.first_row[shard])
                    rows = self.labels.block(shard, block)
                    # A full disk is an error here; later, when memory is written to, it would be a crash. Only for rows
                    # that were read: a manifest's claims take no disk.
                    if hasattr(os, "posix_fallocate") and len(rows):
                        start = len(header) + first * dtype.itemsize
                        os.posix_fallocate(stream.fileno(), start, len(rows) * dtype.itemsize)
                    fill(records[first : first + len(rows)], rows, self.labels, shard)
                # msync, so that the fsync before the rename covers what was written through the map.
                records.flush()
                del records
            # Opened before it has its name, by which others may remove it where there are no locks.
            file = OpenFile(aside)
            lock(file.descriptor, fcntl.LOCK_SH)
        return _opened(file, dtype, len(self.labels))

    def _fetched_ahead(self, block: int) -> Iterator[int]:
        """Yield the shards that have rows, each once its file is on this host.

        Threads of the executor fetch the next files meanwhile. They only fill the label set's cache, so that nothing is
        shared with this thread but their futures.
        """
        filled = [entry.index for entry in self.labels.manifest.shards if entry.rows]

        def fetch(shard: int) -> int:
            self.labels.fetch(shard, block)
            return shard

        with ThreadPoolExecutor(FETCH_AHEAD, thread_name_prefix="ferkd-fetch") as executor:
            # Few at a time: what is fetched much too early may be dropped from the cache before it is read.
            yield from look_ahead(executor, fetch, filled, depth=FETCH_AHEAD)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


class _OpenBlock(NamedTuple):
    records: Records
    file: OpenFile
    """Holds a shared lock for as long as the block is open here."""


def _opened(file: OpenFile, dtype: np.dtype[np.void], rows: int) -> _OpenBlock:
    """Map a block. Raises ValueError where the file holds something else, or ends too early."""
    content, header = file.map(), _header(dtype, rows)
    # Compared, not parsed: a damaged header can make NumPy's parser do anything.
    if content[: len(header)] != header:
        raise ValueError("it is no block of this label set")
    # Raises ValueError where the file is shorter than its rows need.
    return _OpenBlock(np.frombuffer(content, dtype, rows, len(header)), file)


def _header(dtype: np.dtype[np.void], rows: int) -> bytes:
    """Return the first bytes of a block's file: a header of NumPy's format 1.0, as `np.save` writes it."""
    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


def _remove_unused(path: Path) -> None:
    """Remove a block's file; not where a process has it open or, without locks to tell, used it within a day."""
    with suppress(FileNotFoundError, BlockingIOError), OpenFile(path) as file:
        used = os.fstat(file.descriptor).st_mtime
        if lock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) or time.time() - used > STALE_SECONDS:
            path.unlink()
