"""The order of images in an epoch: pure functions of (seed, epoch) that need no list of all images.

A position is an image's number in an epoch's order; a row is its number in the label set.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.errors import UsageError

Rows = npt.NDArray[np.int64]
OrderKind = Literal["global", "shards", "sequential"]
ORDERS: tuple[OrderKind, ...] = get_args(OrderKind)
ROUNDS = 6
"""Rounds of the Feistel network; 4 suffice for a random permutation in theory (Luby and Rackoff, 1988)."""
KNOWN_CHUNKS = 4
"""Number of chunks that `InChunks` keeps."""


class NeededShards(NamedTuple):
    """Shards that a piece of an epoch needs, for orders that go from shard to shard."""

    now: list[int]
    """Shards that a piece of the epoch needs, and those shuffled together with them."""
    coming: list[int]
    """The shards after them."""


class Order(Protocol):
    """The order of an epoch's images, evaluated at some positions."""

    def rows(self, positions: Rows) -> Rows:
        """Return the rows at these positions of the epoch, in their shape."""

    def needed_shards(self, positions: Rows) -> NeededShards | None:
        """Return the shards of these positions; None where any shard may be needed at any time."""


def permute(positions: Rows, size: int, key: int) -> Rows:
    """Evaluate a pseudo-random permutation of 0 .. size - 1 at some positions, without a table, whatever the size.

    A Feistel network permutes 0 .. 4**h - 1, the next power of four. A value outside the range is sent through again
    until it falls inside (cycle walking), which leaves a permutation of the range.
    """
    # Half of the bits of size - 1, rounded up: 4**half is at least `size` and at most 4 * size.
    half = max(1, ((max(size - 1, 1)).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = rng.counter64(key, np.arange(ROUNDS))
    values = np.asarray(positions, np.uint64).copy()
    pending = np.arange(values.size)
    # A view of `values`, which is contiguous: writing to it fills the result.
    flat = values.reshape(-1)
    while pending.size:
        flat[pending] = _feistel(flat[pending], keys, np.uint64(half), mask)
        # At least a quarter of the network's range lies inside: on average, a value goes through at most 4 times.
        pending = pending[flat[pending] >= size]
    permuted: Rows = values.astype(np.int64)
    return permuted


def _feistel(values: rng.UInt64s, keys: rng.UInt64s, half: np.uint64, mask: np.uint64) -> rng.UInt64s:
    left, right = values >> half, values & mask
    for key in keys:
        # A round can be undone whatever its function is, which makes the whole a permutation.
        left, right = right, left ^ (rng.mix64(right ^ key) & mask)
    result: rng.UInt64s = (left << half) | right
    return result


class Sequential:
    """Images in the order of the label set."""

    def __init__(self, shard_rows: Sequence[int] | Rows, *, shards_ahead: int) -> None:
        # Empty shards have no files, so no stage may name them. Selections leave such shards behind.
        self._full = np.flatnonzero(np.asarray(shard_rows))
        self._stops = np.cumsum(np.asarray(shard_rows)[self._full])
        self._shards_ahead = shards_ahead

    def rows(self, positions: Rows) -> Rows:
        return positions

    def needed_shards(self, positions: Rows) -> NeededShards:
        # side="right": a position equal to a shard's stop is the first of the next shard.
        touched = np.unique(np.searchsorted(self._stops, positions, side="right"))
        after = int(touched[-1]) + 1
        coming = self._full[after : after + self._shards_ahead]
        return NeededShards(self._full[touched].tolist(), coming.tolist())


@dataclass(frozen=True)
class GlobalShuffle:
    """One permutation of all images: any image may follow any other."""

    num_images: int
    key: int

    def rows(self, positions: Rows) -> Rows:
        return permute(positions, self.num_images, self.key)

    def needed_shards(self, positions: Rows) -> None:
        return None


class ShardShuffle:
    """Shards in random order, a few at a time, and the images of those few shuffled: for shards that are streamed."""

    def __init__(self, shard_rows: Sequence[int] | Rows, key: int, *, shards_together: int) -> None:
        counts = np.asarray(shard_rows, np.int64)
        # _starts and _first: where each shard begins in the shuffled order, and in the label set.
        first = np.cumsum([0, *counts])[:-1]
        self._key = key
        self._shards = permute(np.arange(len(counts)), len(counts), rng.hash64("shards", key))
        self._starts = np.cumsum([0, *counts[self._shards]])
        self._first = first[self._shards]
        self._group_size = shards_together
        # Every shards_together-th start, and the end of the last group, which may have fewer shards.
        self._group_starts = np.append(self._starts[:-1:shards_together], self._starts[-1])

    def rows(self, positions: Rows) -> Rows:
        flat = np.asarray(positions, np.int64).reshape(-1)
        found = np.empty_like(flat)
        groups = self._groups(flat)
        for group in np.unique(groups):
            inside = groups == group
            start, stop = int(self._group_starts[group]), int(self._group_starts[group + 1])
            # A permutation within the group: its shards alone have to be open for all of its positions.
            shuffled = start + permute(flat[inside] - start, stop - start, rng.hash64("group", self._key, int(group)))
            shard = np.searchsorted(self._starts, shuffled, side="right") - 1
            found[inside] = self._first[shard] + shuffled - self._starts[shard]
        return found.reshape(np.shape(positions))

    def needed_shards(self, positions: Rows) -> NeededShards:
        groups = np.unique(self._groups(positions)).tolist()
        now = [shard for group in groups for shard in self._shards_of(group)]
        return NeededShards(now, self._shards_of(groups[-1] + 1))

    def _groups(self, positions: Rows) -> Rows:
        return np.searchsorted(self._group_starts, positions, side="right") - 1

    def _shards_of(self, group: int) -> list[int]:
        """List the shards of a group that have rows."""
        numbers = range(group * self._group_size, min((group + 1) * self._group_size, len(self._shards)))
        return [int(self._shards[i]) for i in numbers if self._starts[i] < self._starts[i + 1]]


class InChunks:
    """Another order, evaluated for a chunk of positions at once: batch by batch it would cost 2 % of the loading."""

    def __init__(self, order: Order, num_images: int, *, chunk: int = 4096) -> None:
        self._order, self._num_images, self._chunk = order, num_images, chunk
        self._known: OrderedDict[int, Rows] = OrderedDict()

    def rows(self, positions: Rows) -> Rows:
        found = np.empty_like(positions)
        chunks = positions // self._chunk
        for number in np.unique(chunks).tolist():
            inside = chunks == number
            found[inside] = self._rows_of(number)[positions[inside] - number * self._chunk]
        return found

    def needed_shards(self, positions: Rows) -> NeededShards | None:
        return self._order.needed_shards(positions)

    def _rows_of(self, number: int) -> Rows:
        if number not in self._known:
            stop = min((number + 1) * self._chunk, self._num_images)
            self._known[number] = self._order.rows(np.arange(number * self._chunk, stop))
            # The oldest goes. A window touches one or two chunks, and a stand-in for an image a later one.
            if len(self._known) > KNOWN_CHUNKS:
                self._known.popitem(last=False)
        return self._known[number]


@dataclass(frozen=True)
class FromPosition:
    """An order from a position on, which is position 0 here."""

    order: Order
    first: int

    def rows(self, positions: Rows) -> Rows:
        return self.order.rows(positions + self.first)

    def needed_shards(self, positions: Rows) -> NeededShards | None:
        return self.order.needed_shards(positions + self.first)


def check_order(kind: str) -> None:
    """Raise UsageError for an unknown kind of order."""
    if kind not in ORDERS:
        raise UsageError(f"order must be {', '.join(ORDERS)}, got {kind!r}")


def epoch_order(
    kind: str, shard_rows: Sequence[int] | Rows, *, seed: int, epoch: int, shards_together: int = 8
) -> Order:
    """Return the order of an epoch: `sequential`, `global` or `shards`. Raises UsageError for another kind."""
    check_order(kind)
    key = rng.hash64("order", seed, epoch)
    if kind == "sequential":
        return Sequential(shard_rows, shards_ahead=shards_together)
    if kind == "global":
        return GlobalShuffle(int(np.sum(shard_rows)), key)
    return ShardShuffle(shard_rows, key, shards_together=shards_together)
