"""A crop block as one memory-mapped file of fixed-size records, so that labels can be read at random.

A global shuffle touches every shard at once. The block is unpacked once for all workers and ranks of a host, into
`block-BBB.npy` under a folder named by the label set's digest, written aside and renamed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.label_set import LabelSet
from ferkd_data.loader.records import Records, fill, record_dtype
from ferkd_data.storage import explain_full_disk, locked_for_cache, remove_leftovers, write_atomically

FETCH_AHEAD = 4
"""Files of a remote label set that are on their way at once."""


class LabelCache:
    """Blocks of one label set, unpacked when first asked for. Can be pickled; maps are opened where they are used."""

    def __init__(self, labels: LabelSet, cache_dir: Path) -> None:
        self.labels = labels
        self.folder = cache_dir / labels.identity[:32]
        self._open: dict[int, Records] = {}

    def take(self, block: int, rows: npt.NDArray[np.int64]) -> Records:
        """The records of these rows, as `block` has them."""
        return self.block(block)[rows]

    def prepare(self, blocks: set[int]) -> None:
        """Unpack blocks before workers ask for them, and drop the others."""
        for block in sorted(blocks):
            self.block(block)
        self.drop_except(blocks)

    def block(self, block: int) -> Records:
        """Records of every row, read-only and memory-mapped: (images,).

        Raises ShardError for a damaged shard, StorageFullError when the cache's disk is full.
        """
        if block not in self._open:
            path = self.folder / f"block-{block:03d}.npy"
            found = self._load(path, block)
            if found is None:
                with locked_for_cache(self.folder / "lock"):
                    found = self._load(path, block)
                    if found is None:
                        self._unpack(path, block)
                        found = self._load(path, block)
            if found is None:
                raise RuntimeError(f"{path}: was written, but cannot be read back")
            self._open[block] = found
        return self._open[block]

    def drop_except(self, blocks: set[int]) -> None:
        """Forget other blocks and remove their files; processes that still map them keep what they have."""
        self._open = {block: records for block, records in self._open.items() if block in blocks}
        for path in self.folder.glob("block-*.npy"):
            if int(path.stem.removeprefix("block-")) not in blocks:
                path.unlink(missing_ok=True)

    def _load(self, path: Path, block: int) -> Records | None:
        """None where the file is missing, short, or of another kind."""
        try:
            records = np.load(path, mmap_mode="r", allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError, OSError):
            return None
        fits = records.dtype == record_dtype(self.labels, block) and records.shape == (len(self.labels),)
        return records if fits else None

    def _unpack(self, path: Path, block: int) -> None:
        remove_leftovers(self.folder)
        with write_atomically(path) as aside, explain_full_disk(aside):
            shape = (len(self.labels),)
            # Reserving the space first turns a full disk into an error here; writing through a map would be a crash.
            records = np.lib.format.open_memmap(aside, mode="w+", dtype=record_dtype(self.labels, block), shape=shape)
            with aside.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, aside.stat().st_size)
            for shard in self._fetched_ahead(block):
                first = int(self.labels.first_row[shard])
                part = records[first : first + self.labels.manifest.shards[shard].rows]
                fill(part, self.labels, shard, block)
            records.flush()
            del records

    def _fetched_ahead(self, block: int) -> Iterator[int]:
        """The shards that have rows, each once its file is on this host; the next ones come meanwhile."""
        pending: deque[tuple[int, Future[None]]] = deque()
        with ThreadPoolExecutor(FETCH_AHEAD, thread_name_prefix="ferkd-fetch") as executor:
            for entry in self.labels.manifest.shards:
                if entry.rows:
                    pending.append((entry.index, executor.submit(self.labels.fetch, entry.index, block)))
                if len(pending) > FETCH_AHEAD:
                    yield _arrived(pending.popleft())
            while pending:
                yield _arrived(pending.popleft())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def _arrived(fetch: tuple[int, Future[None]]) -> int:
    shard, future = fetch
    future.result()
    return shard
