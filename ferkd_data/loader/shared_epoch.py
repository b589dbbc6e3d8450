"""State that the processes which read one data set share: the epoch, and which of its crops each row gives next.

It lies in a temporary file that all of them map: worker processes by fork, spawn or fork server, whether they live for
one epoch or for many. A lock on the file makes each change one step.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import get_worker_info

from ferkd_data.scratch import Scratch

FILE_NAME = "epoch.bin"
RUNS = 16
"""Number of iterations over a stream that may be under way at once."""
HEADER = np.dtype(
    [
        ("epoch", "<i8"),
        ("calls", "<i8"),
        ("begun", "<i8"),
        ("followed", "<i8"),
        ("runs", "<i8"),
        ("run", "<i8", (RUNS, 3)),
    ]
)
PLACE_BITS = 40
"""Of the number kept for each row: its next place. Above them lies the beginning since which that counts."""


class SharedEpoch:
    """An epoch, and each row's next place. Can be pickled, as long as the original, which removes the file, exists.

    Places are the readings of a row in the order in which they give its crops: an epoch has `per_epoch` of them.
    """

    def __init__(self, num_rows: int, per_epoch: int = 1) -> None:
        self._scratch = Scratch("epoch")
        self._path = self._scratch.path / FILE_NAME
        self._num_rows, self._per_epoch = num_rows, per_epoch
        # Sparse: rows that are never read take no space.
        with self._path.open("xb") as file:
            file.truncate(HEADER.itemsize + 8 * max(num_rows, 1))
        self._open()

    @property
    def epoch(self) -> int:
        return int(self._header["epoch"])

    @property
    def calls(self) -> int:
        """How often `set_epoch` was called."""
        return int(self._header["calls"])

    def set_epoch(self, epoch: int) -> None:
        """Let rows go on with the places of an epoch, and the next run over a stream be this epoch.

        A later epoch than before leaves out places that a row was read at already; the same one, or an earlier one,
        begins anew.
        """
        with self._locked():
            if epoch <= self.epoch:
                self._header["begun"] += 1
            self._header["epoch"] = epoch
            self._header["calls"] += 1

    def follow(self, leader: SharedEpoch) -> None:
        """Take over the epoch of another one, and what it is told from now on."""
        self._header["epoch"], self._header["followed"] = leader.epoch, leader.calls

    def visit(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Read each of these rows once more, in this order: the epoch of its place, and the number there, from 0."""
        visits = []
        with self._locked():
            first = self.epoch * self._per_epoch
            stamp = int(self._header["begun"]) << PLACE_BITS
            for row in rows:
                kept = int(self._places[row])
                place = max(first, kept - stamp if kept >= stamp else 0)
                visits.append(divmod(place, self._per_epoch))
                self._places[row] = stamp + place + 1
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
        self._places: npt.NDArray[np.uint64] = np.memmap(
            self._path, np.uint64, "r+", offset=HEADER.itemsize, shape=(max(self._num_rows, 1),)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_num_rows": self._num_rows, "_per_epoch": self._per_epoch}

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
