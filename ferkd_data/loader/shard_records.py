"""Labels that are read shard by shard: each (shard, crop block) is unpacked when it is needed, or a little before.

The unpacked records lie in the cache beside the shards, as files named by what they hold; all processes of a host map
the same file. Shards already passed go when the cache is full.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import LoaderError
from ferkd_data.label_set import LabelSet
from ferkd_data.loader.held_files import HeldFiles
from ferkd_data.loader.order import Stage
from ferkd_data.loader.records import Records, are_intact, fill, record_dtype
from ferkd_data.shard_cache import ShardCache
from ferkd_data.storage import FREE_CACHE, write_atomically

SUFFIX = ".records"
log = logging.getLogger("ferkd_data.loader")


class ShardRecords:
    """The same rows as a `LabelCache` gives, for orders that go from shard to shard. Can be pickled."""

    def __init__(self, labels: LabelSet, cache_dir: Path) -> None:
        self.labels = labels
        self._cache = ShardCache(cache_dir / "shards", labels.cache_bytes)
        self._held = HeldFiles(self._open)

    def prepare(self, blocks: set[int]) -> None:
        """Nothing needs to be there before the first batch is asked for."""

    def forget_except(self, blocks: set[int]) -> None:
        """`stage` says what is no longer needed."""

    def stage(self, stage: Stage | None, blocks: set[int]) -> None:
        """Fetch the shards of this stage, in the background, and let go of all others."""
        if stage is not None:
            now, coming = ([(shard, block) for shard in shards for block in sorted(blocks)] for shards in stage)
            self._held.stage(now, coming)

    def take(self, block: int, rows: npt.NDArray[np.int64]) -> Records:
        """The records of these rows. Raises ShardError, RemoteError, StorageFullError."""
        first = self.labels.first_row
        shards = np.searchsorted(first, rows, side="right") - 1
        found = np.empty(len(rows), record_dtype(self.labels, block))
        for shard in np.unique(shards).tolist():
            inside = shards == shard
            found[inside] = self._take_of(shard, block, rows[inside] - first[shard])
        return found

    def _take_of(self, shard: int, block: int, rows: npt.NDArray[np.int64]) -> Records:
        found: Records = self._held.get((shard, block))[rows]
        if not are_intact(found):
            path = self._path(shard, block)
            log.warning("%s: damaged on its disk; made again", path)
            path.unlink(missing_ok=True)
            self._held.drop((shard, block))
            found = self._held.get((shard, block))[rows]
            if not are_intact(found):
                raise LoaderError(f"{path}: damaged again right after it was written; is the disk at its end?")
        return found

    def _open(self, key: tuple[int, int]) -> Records:
        shard, block = key
        dtype, rows = record_dtype(self.labels, block), self.labels.manifest.shards[shard].rows

        def unpack(path: Path) -> None:
            records = np.empty(rows, dtype)
            fill(records, self.labels.block(shard, block), self.labels, shard)
            # NumPy's tofile would not say that the disk is full.
            with write_atomically(path, sync=False, advice=FREE_CACHE) as aside, aside.open("wb") as stream:
                stream.write(records.view(np.uint8).data)

        with self._cache.open(self._path(shard, block).name, rows * dtype.itemsize, unpack) as file:
            return np.frombuffer(file.map(), dtype)

    def _path(self, shard: int, block: int) -> Path:
        told = f"{self.labels.identity} {shard} {block} {record_dtype(self.labels, block).descr}"
        return self._cache.path(hashlib.sha256(told.encode()).hexdigest() + SUFFIX)

    def __getstate__(self) -> dict[str, Any]:
        return {"labels": self.labels, "_cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._held = HeldFiles(self._open)
