"""State that the processes which read one data set share: the epoch, and which of its crops each row gives next.

It lies in a temporary file that all of them map: worker processes by fork, spawn or fork server, whether they live for
one epoch or for many. A lock on the file makes each change one step. Each of several processes that train together has
a file of its own (`SharedEpoch.of`), also where all of them have copies of one data set, as those do that were forked.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import get_worker_info

from ferkd_data.loader.ranks import Ranks
from ferkd_data.scratch import Scratch, owner_is_gone

FILE_NAME = "epoch.bin"
RUNS = 16
"""Number of iterations over a stream that may be under way at once."""
WORKER_WORDS = 16
"""64-bit words with one bit for each worker of an iteration; workers beyond these 1024 share bits."""
HEADER = np.dtype(
    [
        ("epoch", "<i8"),
        ("calls", "<i8"),
        ("begun", "<i8"),
        ("followed", "<i8"),
        ("owner", "<i8"),
        ("runs", "<i8"),
        ("run", "<i8", (RUNS, 3)),
        ("joined", "<u8", (RUNS, WORKER_WORDS)),
        ("warned", "<i8"),
    ]
)
READING_BITS = 40
"""Lower bits of the number kept for each row: its next reading. The upper ones are the beginning it counts from."""


class SharedEpoch:
    """An epoch, and each row's next reading.

    Pickled copies share both, as long as the original, which removes the file, exists. A deep copy has its own.

    The readings of a row are numbered in the order in which they give its crops: epoch e has `e * per_epoch` and the
    `per_epoch - 1` after it.
    """

    _told: int | None = None
    """The epoch that the training has set, in this process; None where Accelerate has set one since."""

    def __init__(self, num_rows: int, per_epoch: int = 1) -> None:
        # Owned by the process that made it: copies map the same file and remove nothing.
        self._scratch = Scratch("epoch")
        self._path = self._scratch.path / FILE_NAME
        self._num_rows, self._per_epoch = num_rows, per_epoch
        self._make(self._path)
        self._open()

    def of(self, ranks: Ranks) -> SharedEpoch:
        """Return the state of one process of several that train together; it begins with this epoch.

        Ranks begin their epochs at different moments, so they must not move each other on.
        """
        if ranks.world_size == 1:
            return self
        if ranks not in self._of_ranks:
            path = self._path.with_name(f"epoch-{ranks.rank}-of-{ranks.world_size}.bin")
            # Two workers of a rank may come first at once. A file of a rank that has ended is one of an earlier
            # training, which may have been left at another epoch than those of other ranks.
            with self._locked():
                if not path.exists() or not _is_alive(int(np.fromfile(path, HEADER, 1)["owner"][0])):
                    self._make(path, self._header)
            self._of_ranks[ranks] = copy = SharedEpoch.__new__(SharedEpoch)
            copy.__setstate__(self.__getstate__() | {"_path": path})
        return self._of_ranks[ranks]

    def _make(self, path: Path, like: Any = None) -> None:
        """Make a file of rows that were never read, with the epoch of another one."""
        header = np.zeros((), HEADER)
        for name in ("epoch", "calls", "followed"):
            header[name] = 0 if like is None else like[name]
        parent = multiprocessing.parent_process()
        # A DataLoader's worker makes it for the process that trains.
        header["owner"] = os.getpid() if get_worker_info() is None or parent is None else parent.pid
        aside = path.with_suffix(".new")
        with aside.open("wb") as file:
            file.write(header.tobytes())
            # Sparse: rows that are never read take no space.
            file.truncate(HEADER.itemsize + 8 * max(self._num_rows, 1))
        aside.rename(path)

    @property
    def epoch(self) -> int:
        return int(self._header["epoch"])

    @property
    def calls(self) -> int:
        """The number of calls of `set_epoch`."""
        return int(self._header["calls"])

    def set_epoch(self, epoch: int) -> None:
        """Let every row begin with the first reading of an epoch, and the next run over a stream be this epoch.

        It does not matter what a row has given before: workers may have read ahead, and a resumed training has the
        crops of the one that was interrupted.
        """
        self._warn_if_accelerate_overrides(epoch)
        with self._locked():
            # Another beginning makes all numbers kept before smaller than the new stamp, and so invalid, in one step.
            self._header["begun"] += 1
            self._header["epoch"] = epoch
            # Samplers and streams compare it with what they saw last: an equal epoch may still be a new call.
            self._header["calls"] += 1

    def _warn_if_accelerate_overrides(self, epoch: int) -> None:
        """Warn where Accelerate's loader sets another epoch than the training did."""
        if not _is_accelerates_own_call():
            self._told = epoch
            return
        if self._told not in (None, epoch):
            warnings.warn(
                f"Accelerate begins epoch {epoch}, after set_epoch({self._told}) of the data set: a prepared loader "
                "counts whole epochs, from 0 in each process, and tells the data set. Call set_epoch of the prepared "
                "loader before each epoch too",
                stacklevel=4,
            )
        self._told = None

    def follow(self, leader: SharedEpoch) -> None:
        """Take over the epoch of another one, and what it is told from now on."""
        self._header["epoch"], self._header["followed"] = leader.epoch, leader.calls

    def visit(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Count one reading of each of these rows, in this order; return its epoch and its number there, from 0."""
        visits = []
        with self._locked():
            first = self.epoch * self._per_epoch
            # Beginning in the upper 24 bits, reading in the lower 40: one word for each row, 0 in a file of zeros.
            stamp = int(self._header["begun"]) << READING_BITS
            for row in rows:
                kept = int(self._next[row])
                # Not before the epoch's first reading, and not one that the row has given since the beginning.
                reading = max(first, kept - stamp if kept >= stamp else 0)
                visits.append(divmod(reading, self._per_epoch))
                self._next[row] = stamp + reading + 1
        return visits

    def first_warning(self) -> bool:
        """Return whether this is the first call, of all processes that read the data set."""
        with self._locked():
            is_first, self._header["warned"] = not self._header["warned"], 1
            return is_first

    def begin_run(self, token: RunToken, leader: SharedEpoch) -> int:
        """Return the epoch of an iteration over a stream, and move the stream on by one.

        All worker processes of one iteration come with the same `token`, but for their number, and get the same epoch,
        whichever comes first. Where `set_epoch` was called on `leader`, the data set of the stream, the stream follows.
        """
        word, bit = divmod(token.worker % (64 * WORKER_WORDS), 64)
        with self._locked():
            runs, joined, begun = self._header["run"], self._header["joined"], int(self._header["runs"])
            # The latest first: of two with the same token, an earlier one may have been left before all workers came.
            for number in (run % RUNS for run in reversed(range(max(begun - RUNS, 0), begun))):
                seed, count, epoch = runs[number].tolist()
                # A worker begins an iteration once. Where it comes again with the same seed, the training has seeded
                # its generator anew, and this is another iteration.
                if (seed, count) == token[:2] and not int(joined[number, word]) >> bit & 1:
                    joined[number, word] |= np.uint64(1 << bit)
                    return int(epoch)
            epoch = self.epoch
            if int(self._header["followed"]) != leader.calls:
                epoch, self._header["followed"] = leader.epoch, leader.calls
            # The oldest is overwritten: its workers have all begun long ago.
            oldest = begun % RUNS
            runs[oldest], joined[oldest] = (*token[:2], epoch), 0
            joined[oldest, word] = np.uint64(1 << bit)
            self._header["runs"] += 1
            self._header["epoch"] = epoch + 1
            return epoch

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A lock of the process (fcntl), not of the open file: forked workers share the descriptor, and flock would let
        # all in.
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def _open(self) -> None:
        self._of_ranks: dict[Ranks, SharedEpoch] = {}
        self._descriptor = os.open(self._path, os.O_RDWR)
        weakref.finalize(self, os.close, self._descriptor)
        self._header: Any = np.memmap(self._path, HEADER, "r+", shape=())
        self._next: npt.NDArray[np.uint64] = np.memmap(
            self._path, np.uint64, "r+", offset=HEADER.itemsize, shape=(max(self._num_rows, 1),)
        )

    def __deepcopy__(self, memo: Any) -> SharedEpoch:
        """Copy the epoch and the numbers too: a copy within a process is another data set's, unlike a worker's."""
        copy = SharedEpoch.__new__(SharedEpoch)
        copy._scratch = Scratch("epoch")
        with self._locked():
            # Those of ranks lie beside it.
            for file in self._path.parent.glob("epoch*.bin"):
                shutil.copyfile(file, copy._scratch.path / file.name)
        copy.__setstate__(self.__getstate__() | {"_path": copy._scratch.path / self._path.name})
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_num_rows": self._num_rows, "_per_epoch": self._per_epoch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        try:
            self._open()
        except FileNotFoundError as error:
            raise owner_is_gone(self._path) from error


def _is_accelerates_own_call() -> bool:
    """Return whether Accelerate's loader called into this package by itself, and nobody called its `set_epoch`."""
    frame: FrameType | None = sys._getframe()
    while _package(frame) == "ferkd_data":
        frame = frame and frame.f_back
    # The loader's `set_epoch`, and what called that: its `__iter__`, or the training.
    return _package(frame) == _package(frame and frame.f_back) == "accelerate"


def _package(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    return True


class RunToken(NamedTuple):
    """The name of an iteration over a stream, and the worker process that begins it."""

    seed: int
    """The base seed of a DataLoader's workers, or a number that stands for a process without workers."""
    begun: int
    """Iterations that this process has begun, this one included."""
    worker: int
    """The worker's number, 0 without workers."""


class RunTokens:
    """Names the iterations over a stream, the same in all worker processes of one DataLoader iteration.

    Workers that live for one epoch share a seed, which is that of another iteration only where the training seeds its
    generator anew; workers that live on begin their n-th iteration together.
    """

    def __init__(self) -> None:
        self._process, self._begun = 0, 0

    def next(self) -> RunToken:
        worker, process = get_worker_info(), os.getpid()
        # Forked or unpickled in a worker: it counts its own iterations from here.
        if self._process != process:
            self._process, self._begun = process, 0
        self._begun += 1
        if worker is None:
            # Without workers; negative, so that it is no seed of a DataLoader.
            return RunToken(-process, self._begun, 0)
        # A worker's seed is the base seed of its DataLoader iteration plus its number.
        return RunToken((worker.seed - worker.id) % 2**62, self._begun, worker.id)
