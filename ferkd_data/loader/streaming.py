"""Read labels shard by shard: keep the files of the shards in work open, and fetch the next ones meanwhile.

`HeldFiles` keeps files open and fetches ahead. The workers of a loader share the fetching out among themselves: what
one has fetched, the others find in the cache. `StreamedLabels` gives the labels: each (shard, crop block) is unpacked
when it is needed, or a little before.

The unpacked records lie in the cache beside the shards, as files named by what they hold; all processes of a host map
the same file. Shards already passed go when the cache is full.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import FerkdError
from ferkd_data.label_set import LabelSet
from ferkd_data.label_set.files import ShardCache
from ferkd_data.loader.label_cache import UNVERIFIED, Records, fill, record_dtype, taken_intact
from ferkd_data.loader.order import NeededShards
from ferkd_data.storage import FREE_CACHE, write_atomically

K = TypeVar("K")
T = TypeVar("T")
THREADS = 4
"""Fetching threads of all workers of a loader together; each has at least one."""
LAST_SECONDS = 5.0
"""Seconds that a process waits at its end for fetching threads, all in all."""

_share = (0, 1)
"""This process's number among a loader's workers, and how many they are."""


def set_share(number: int, of: int) -> None:
    """Say which of a loader's workers this process is."""
    global _share
    _share = (number, of)


class HeldFiles(Generic[K, T]):
    """`held.get(key)` is what `open_one(key)` gave; closed with its last reference.

    One thread uses it; threads of the fetcher call `fetch` beside it. Both only set or remove single entries of
    dictionaries, which is one step each under the interpreter's lock; a file that both open is kept once.
    """

    def __init__(self, open_one: Callable[[K], T], limit: int | None = None) -> None:
        """`limit` is how many files may be open that no stage has named."""
        self._open_one = open_one
        self._limit = limit
        self._open: dict[K, T] = {}
        self._wanted: dict[K, None] = {}
        self._fetcher: _Fetcher | None = None

    def get(self, key: K) -> T:
        found = self._open.get(key)
        if found is None:
            # Before the next one is opened, so that never more than `limit` are open.
            if self._limit is not None:
                self.forget(self._limit - 1)
            # Also for files that no stage has named: the next stage then knows that this one is open.
            self._wanted[key] = None
            # Where a fetching thread was faster, its file is kept and this one is closed with its last reference.
            found = self._open.setdefault(key, self._open_one(key))
        return found

    def drop(self, key: K) -> None:
        """Open this file anew when it is asked for next."""
        self._open.pop(key, None)

    def forget(self, limit: int) -> None:
        """Keep the `limit` files that were opened last."""
        for key in list(self._open)[: max(len(self._open) - limit, 0)]:
            del self._open[key], self._wanted[key]

    def prefetch(self, now: Iterable[K], coming: Iterable[K]) -> None:
        """Close all other files, and fetch this worker's share of these in the background."""
        wanted = dict.fromkeys((*now, *coming))
        # What is open or asked for already is not asked for again.
        fresh = [key for key in wanted if key not in self._wanted]
        self._wanted = wanted
        for key in list(self._open):
            if key not in wanted:
                del self._open[key]
        # Workers divide the fetching: each asks for every step-th file. All find what any of them has fetched in the
        # cache.
        first, step = _share
        for key in fresh[first::step]:
            if self._fetcher is None:
                # Started with the first file to fetch, in the process that reads: threads do not survive a fork.
                self._fetcher = _Fetcher(weakref.WeakMethod(self.fetch), max(1, THREADS // step))
                # At exit `_end_all` ends all of them, and waits.
                weakref.finalize(self, self._fetcher.end).atexit = False
            self._fetcher.asked.put(key)

    def fetch(self, key: K) -> None:
        """Open a file if it is still wanted; called in the background."""
        if key not in self._wanted or key in self._open:
            return
        try:
            found = self._open_one(key)
        except (FerkdError, OSError):
            # Whoever needs the file asks for it again, and says what is wrong with it.
            return
        # A later stage may have begun meanwhile; then the file is closed here.
        if key in self._wanted:
            self._open.setdefault(key, found)


class _Fetcher:
    """A few fetching threads. They hold a weak reference to what they work for, and end with it."""

    living: ClassVar[weakref.WeakSet[_Fetcher]] = weakref.WeakSet()

    def __init__(self, fetch: weakref.WeakMethod[Any], num_threads: int) -> None:
        self.asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._fetch = fetch
        self._ended = False
        # Daemons, since a server may keep a thread waiting for minutes.
        self._threads = [
            threading.Thread(target=self._work, name="ferkd-fetch", daemon=True) for _ in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        self.living.add(self)

    def end(self) -> None:
        self._ended = True
        for _ in self._threads:
            # One for each thread, which may be waiting for a key.
            self.asked.put(None)

    def join(self, deadline: float) -> None:
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def _work(self) -> None:
        while True:
            key = self.asked.get()
            # A strong reference, held while the file is fetched and no longer: else these threads would keep their
            # owner alive.
            fetch = self._fetch()
            if self._ended or fetch is None:
                return
            fetch(key)
            del fetch


@atexit.register
def _end_all() -> None:
    """End all fetching threads: one that returns from a library after Python has ended would crash the process."""
    fetchers, deadline = list(_Fetcher.living), time.monotonic() + LAST_SECONDS
    # All are told before any is waited for, so that they end side by side.
    for fetcher in fetchers:
        fetcher.end()
    for fetcher in fetchers:
        fetcher.join(deadline)


SUFFIX = ".records"
log = logging.getLogger("ferkd_data.loader")


class StreamedLabels:
    """The records that a `LabelCache` gives, for orders that go from shard to shard. Can be pickled."""

    def __init__(self, labels: LabelSet, cache_dir: Path) -> None:
        self.labels = labels
        self._cache = ShardCache(cache_dir / "shards", labels.cache_bytes)
        self._held = HeldFiles(self._open)

    def prepare(self, blocks: set[int]) -> None:
        """Nothing needs to be there before the first batch is asked for."""

    def forget_except(self, blocks: set[int]) -> None:
        """Nothing to do: `prefetch` lets go of the shards that it is not told of."""

    def prefetch(self, needed: NeededShards | None, blocks: set[int]) -> None:
        """Fetch the shards of this stage, in the background, and let go of all others."""
        if needed is not None:
            now, coming = ([(shard, block) for shard in shards for block in sorted(blocks)] for shards in needed)
            self._held.prefetch(now, coming)

    def take(self, block: int, rows: npt.NDArray[np.int64]) -> Records:
        """Return the records of these rows. Raises ShardError, RemoteError, StorageFullError."""
        first = self.labels.first_row
        shards = np.searchsorted(first, rows, side="right") - 1
        found = np.empty(len(rows), record_dtype(self.labels, block))
        for shard in np.unique(shards).tolist():
            inside = shards == shard
            found[inside] = self._take_of(shard, block, rows[inside] - first[shard])
        return found

    def _take_of(self, shard: int, block: int, rows: npt.NDArray[np.int64]) -> Records:
        path = self._path(shard, block)

        def discard() -> None:
            # Processes that have it mapped keep their map; the next to open it finds a new file.
            path.unlink(missing_ok=True)
            self._held.drop((shard, block))

        return taken_intact(lambda: self._held.get((shard, block))[rows], discard, path)

    def _open(self, key: tuple[int, int]) -> Records:
        shard, block = key
        dtype, rows = record_dtype(self.labels, block), self.labels.manifest.shards[shard].rows

        def unpack(path: Path) -> None:
            records = np.empty(rows, dtype)
            fill(records, self.labels.block(shard, block), self.labels, shard)
            # NumPy's tofile would not say that the disk is full.
            with write_atomically(path, sync=False, advice=FREE_CACHE) as aside, aside.open("wb") as stream:
                stream.write(records.view(np.uint8).data)

        # Unpacking opens the shard's file, which has another suffix in the same cache: see `ShardCache.open` on the
        # order.
        with self._cache.open(self._path(shard, block).name, rows * dtype.itemsize, unpack) as file:
            # The map has a copy of the descriptor and, with it, the shared lock: the cache keeps the file for as long
            # as its records are in use.
            return np.frombuffer(file.map(), dtype)

    def _path(self, shard: int, block: int) -> Path:
        # The layout of records is part of the name, so that another version of this code makes files of its own.
        content = f"{self.labels.identity} {shard} {block} {record_dtype(self.labels, block).descr}"
        if not self.labels.is_verified:
            content += UNVERIFIED
        return self._cache.path(hashlib.sha256(content.encode()).hexdigest() + SUFFIX)

    def __getstate__(self) -> dict[str, Any]:
        return {"labels": self.labels, "_cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._held = HeldFiles(self._open)
