"""Number the readings of a data set's rows: which of its crops each of them gets, where rows come more than once.

`Turns` says which crops a reading takes, and `NumberedSampler` numbers readings in the order of a sampler.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch.utils.data import Sampler

from ferkd_data.loader.ranks import Ranks
from ferkd_data.loader.shared_epoch import SharedEpoch


class Numbered(NamedTuple):
    """A row, and the number of one reading of it."""

    row: int
    epoch: int
    number: int
    """From 0, since the epoch began."""


@dataclass(frozen=True)
class Turns:
    """Assignment of a row's crops to its readings: no two readings of an epoch get the same crops, on any rank.

    An epoch has `per_rank * world_size` turns, each of M crops; reading n of a rank takes turn n * world_size + rank.
    """

    per_rank: int = 1
    rank: int = 0
    world_size: int = 1
    repeats: int = 1

    @classmethod
    def of(cls, repeats: int, ranks: Ranks) -> Turns:
        """Return the turns of a row that all ranks together read `repeats` times in an epoch."""
        # Rounded up where ranks do not divide `repeats`: some turns then stay unread, and no two readings share one.
        return cls() if repeats == 1 else cls(-(-repeats // ranks.world_size), *ranks, repeats)

    @property
    def count(self) -> int:
        return self.per_rank * self.world_size

    def turn(self, number: int) -> tuple[int, int]:
        """Return by how many epochs reading `number` (from 0) lies ahead, and its turn in that epoch."""
        ahead, number = divmod(number, self.per_rank)
        return ahead, number * self.world_size + self.rank


class Readable(Protocol):
    """The parts of a CropDataset that numbering needs."""

    turns: Turns

    def __len__(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    @property
    def shared(self) -> SharedEpoch: ...

    def set_epoch(self, epoch: int) -> None: ...


class NumberedSampler(Sampler[Numbered]):
    """Made by `CropDataset.numbered`. Each iteration is another epoch of the data set, in the order of the sampler."""

    def __init__(self, dataset: Readable, sampler: Iterable[int]) -> None:
        self.dataset, self.sampler = dataset, sampler
        self._next, self._calls_seen = dataset.epoch, dataset.shared.calls
        self._warned = False

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch, also for the sampler where that has epochs."""
        self.dataset.set_epoch(epoch)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Numbered]:
        shared = self.dataset.shared
        # `calls` tells a set_epoch of the data set since the last iteration, also one for the same epoch again.
        epoch = self._next if self._calls_seen == shared.calls else shared.epoch
        self._next, self._calls_seen = epoch + 1, shared.calls
        # Counted here, where the sampler runs, and in its order: workers cannot come between.
        counts = np.zeros(len(self.dataset), np.int32)
        for row in self.sampler:
            self._warn_if_beyond(int(row), int(counts[row]))
            yield Numbered(int(row), epoch, int(counts[row]))
            counts[row] += 1

    def _warn_if_beyond(self, row: int, number: int) -> None:
        # Numbers begin anew in each epoch, whatever earlier ones took: that makes a resume exact, and readings beyond
        # `repeats` the same as the next epoch's.
        turns = self.dataset.turns
        if number >= turns.per_rank and not self._warned:
            self._warned = True
            warnings.warn(
                f"the sampler gives row {row} more often in an epoch than repeats= says ({turns.repeats}): what is "
                "beyond takes crops that the next epoch gives again. Give the CropDataset repeats= as many as a row "
                "may come, over all ranks",
                stacklevel=3,
            )
