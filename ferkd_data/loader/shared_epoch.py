"""What the processes that read one data set must agree on: the epoch, and how often each row was read in it.

It lies in a temporary file that all of them map: worker processes by fork, spawn or fork server, whether they live for
one epoch or for many. A lock on the file makes each change one step.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import get_worker_info

RUNS = 16
"""Iterations over a stream that may be under way at once."""
HEADER = np.dtype([("epoch", "<i8"), ("calls", "<i8"), ("followed", "<i8"), ("runs", "<i8"), ("run", "<i8", (RUNS, 3))])
COUNT_BITS = 16
"""Of the number kept for each row: above them lies the call of `set_epoch` since which it counts."""


class Visit(NamedTuple):
    """One reading of a row."""

    epoch: int
    """As `set_epoch` said, else 0."""
    number: int
    """How often the row was read before, since `set_epoch` was called last."""
    told: bool
    """Whether `set_epoch` was ever called."""


class SharedEpoch:
    """An epoch and a count for each row. Can be pickled, as long as the original, which removes the file, exists."""

    def __init__(self, num_rows: int) -> None:
        handle, name = tempfile.mkstemp(prefix="ferkd-data-epoch-")
        self._path = Path(name)
        self._num_rows = num_rows
        # Sparse: rows that are never read take no space.
        os.ftruncate(handle, HEADER.itemsize + 4 * max(num_rows, 1))
        os.close(handle)
        weakref.finalize(self, _remove, self._path, os.getpid())
        self._open()

    @property
    def epoch(self) -> int:
        return int(self._header["epoch"])

    @property
    def calls(self) -> int:
        """How often `set_epoch` was called."""
        return int(self._header["calls"])

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: rows count from nothing, and the next run over a stream is that of this epoch."""
        with self._locked():
            self._header["epoch"] = epoch
            self._header["calls"] += 1

    def follow(self, leader: SharedEpoch) -> None:
        """Take over the epoch of another one, and what it is told from now on."""
        self._header["epoch"], self._header["followed"] = leader.epoch, leader.calls

    def visit(self, rows: Sequence[int]) -> list[Visit]:
        """Count one more reading of each of these rows, in this order."""
        visits = []
        with self._locked():
            epoch, calls = self.epoch, self.calls
            stamp = (calls % (1 << (32 - COUNT_BITS))) << COUNT_BITS
            for row in rows:
                kept = int(self._counts[row])
                number = kept - stamp if 0 <= kept - stamp < 1 << COUNT_BITS else 0
                visits.append(Visit(epoch, number, calls > 0))
                self._counts[row] = stamp + min(number + 1, (1 << COUNT_BITS) - 1)
        return visits

    def begin_run(self, token: tuple[int, int], leader: SharedEpoch) -> int:
        """The epoch of an iteration over a stream, which then moves on by one.

        All worker processes of one iteration come with the same `token` and get the same epoch, whichever comes first.
        Where `set_epoch` was called on `leader`, the data set of the stream, the stream follows.
        """
        with self._locked():
            runs = self._header["run"]
            for first, second, epoch in runs[: min(int(self._header["runs"]), RUNS)].tolist():
                if (first, second) == token:
                    return int(epoch)
            epoch = self.epoch
            if int(self._header["followed"]) != leader.calls:
                epoch, self._header["followed"] = leader.epoch, leader.calls
            runs[int(self._header["runs"]) % RUNS] = (*token, epoch)
            self._header["runs"] += 1
            self._header["epoch"] = epoch + 1
            return epoch

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def _open(self) -> None:
        self._descriptor = os.open(self._path, os.O_RDWR)
        weakref.finalize(self, os.close, self._descriptor)
        self._header: Any = np.memmap(self._path, HEADER, "r+", shape=())
        self._counts: npt.NDArray[np.uint32] = np.memmap(
            self._path, np.uint32, "r+", offset=HEADER.itemsize, shape=(max(self._num_rows, 1),)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_num_rows": self._num_rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class RunTokens:
    """Names the iterations over a stream, the same in all worker processes of one DataLoader iteration.

    Workers that live for one epoch share a seed that no other iteration has; workers that live on begin their n-th
    iteration together.
    """

    def __init__(self) -> None:
        self._process, self._begun = 0, 0

    def next(self) -> tuple[int, int]:
        worker, process = get_worker_info(), os.getpid()
        if self._process != process:
            self._process, self._begun = process, 0
        self._begun += 1
        if worker is None:
            return -process, self._begun
        return (worker.seed - worker.id) % 2**62, self._begun


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
