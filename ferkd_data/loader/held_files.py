"""Files of the shards in work, kept open by one process; those of the next shards are fetched in the background.

The workers of a loader deal the fetching out among themselves: what one has fetched, the others find in the cache.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, TypeVar

from ferkd_data.errors import FerkdError

K = TypeVar("K")
T = TypeVar("T")
THREADS = 4
"""Files that all workers of a loader together have on their way, at least one each."""
LAST_SECONDS = 5.0
"""That a process waits at its end for what is being fetched, all in all."""

_share = (0, 1)
"""This process's number among a loader's workers, and how many they are."""


def set_share(number: int, of: int) -> None:
    """Say which of a loader's workers this process is."""
    global _share
    _share = (number, of)


class HeldFiles(Generic[K, T]):
    """`held.get(key)` is what `open_one(key)` gave; closed with its last reference. To be used by one thread."""

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
            if self._limit is not None:
                self.forget(self._limit - 1)
            self._wanted[key] = None
            found = self._open.setdefault(key, self._open_one(key))
        return found

    def drop(self, key: K) -> None:
        """Open this file anew when it is asked for next."""
        self._open.pop(key, None)

    def forget(self, limit: int) -> None:
        """Keep the `limit` files that were opened last."""
        for key in list(self._open)[: max(len(self._open) - limit, 0)]:
            del self._open[key], self._wanted[key]

    def stage(self, now: Iterable[K], coming: Iterable[K]) -> None:
        """Let go of all others, and fetch this worker's share of these, in the background."""
        wanted = dict.fromkeys((*now, *coming))
        fresh = [key for key in wanted if key not in self._wanted]
        self._wanted = wanted
        for key in list(self._open):
            if key not in wanted:
                del self._open[key]
        first, step = _share
        for key in fresh[first::step]:
            if self._fetcher is None:
                self._fetcher = _Fetcher(weakref.WeakMethod(self.fetch), max(1, THREADS // step))
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
        if key in self._wanted:
            self._open.setdefault(key, found)


class _Fetcher:
    """A few threads that do not keep what they work for alive."""

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
            self.asked.put(None)

    def join(self, deadline: float) -> None:
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def _work(self) -> None:
        while True:
            key = self.asked.get()
            fetch = self._fetch()
            if self._ended or fetch is None:
                return
            fetch(key)
            del fetch


@atexit.register
def _end_all() -> None:
    """A thread that comes back from a library's code when Python is gone already would crash the process."""
    fetchers, deadline = list(_Fetcher.living), time.monotonic() + LAST_SECONDS
    for fetcher in fetchers:
        fetcher.end()
    for fetcher in fetchers:
        fetcher.join(deadline)
