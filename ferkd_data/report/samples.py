"""Sample crops and images of a label set by a rule that depends on the seed and their keys alone.

Each crop has a priority, a hash of (seed, key, crop number). Of every group, the crops with the smallest priorities are
kept. So a label set always gives the same samples, whatever the order of its shards, and memory stays flat.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.labels.rows import CROP_FIELDS, ImageLabels, ShardLabels

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledImage(ImageLabels):
    """A copy of a row, which does not keep its shard in memory, with its row number."""

    row: int
    """Counted over the shards in the order in which they were added."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Crop:
    """A crop: its image and its number there."""

    image: SampledImage
    number: int

    @property
    def p_max(self) -> float:
        return float(self.image.class_prob[self.number, 0])

    @property
    def top1(self) -> int:
        return int(self.image.class_index[self.number, 0])


class Smallest(Generic[Item]):
    """Keep the `capacity` items with the smallest ranks, whatever the order in which they are added."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # heapq keeps the smallest entry first: with negated ranks that is the largest rank. Keys break ties, so that
        # items are never compared.
        self._heap: list[tuple[float, str, int, int, Item]] = []
        self._seen = 0

    @property
    def bound(self) -> float:
        """Rank from which an item would not be kept."""
        if len(self._heap) < self._capacity:
            return float("inf")
        return -self._heap[0][0] if self._heap else float("-inf")

    def add(self, rank: float, key: str, number: int, make: Callable[[], Item]) -> None:
        if rank < self.bound:
            # A damaged label set may hold a key twice; the count avoids a comparison of items then, too.
            self._seen += 1
            entry = (-rank, key, number, self._seen, make())
            if len(self._heap) < self._capacity:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)

    def items(self) -> list[Item]:
        """List the items, the smallest rank first."""
        return [entry[4] for entry in sorted(self._heap, key=lambda entry: (-entry[0], entry[1], entry[2]))]


class CropSample:
    """Keep the `capacity` crops with the smallest priorities of each group."""

    def __init__(self, num_groups: int, capacity: int) -> None:
        self._capacity = capacity
        self._groups = [Smallest[Crop](capacity) for _ in range(num_groups)]

    def add(
        self, labels: ShardLabels, first_row: int, priority: npt.NDArray[np.float64], group: npt.NDArray[np.int64]
    ) -> None:
        """Add a shard: `priority` and `group` are (R, N); a crop with a negative group belongs to none."""
        # Only a crop below its group's bound can enter, hardly any after a few shards. A crop without a group has index
        # -1, the last bound, and no priority is below -1.
        bounds = np.array([kept.bound for kept in self._groups] + [-1.0])
        alive = np.flatnonzero(priority < bounds[np.maximum(group, -1)])
        groups, ranks = group.reshape(-1)[alive], priority.reshape(-1)[alive]
        for number in np.unique(groups).tolist():
            here = np.flatnonzero(groups == number)
            # Of the crops of one shard, no more than the capacity can stay.
            if len(here) > self._capacity:
                here = here[np.argpartition(ranks[here], self._capacity)[: self._capacity]]
            for at in alive[here].tolist():
                row, crop = divmod(at, labels.num_crops)
                make = _maker(labels, row, crop, first_row)
                self._groups[number].add(float(priority[row, crop]), labels.keys[row], crop, make)

    def crops(self) -> list[list[Crop]]:
        """List the crops of each group, the smallest priority first."""
        return [group.items() for group in self._groups]


def _maker(labels: ShardLabels, row: int, crop: int, first_row: int) -> Callable[[], Crop]:
    return lambda: Crop(image=sampled(labels, row, first_row), number=crop)


def sampled(labels: ShardLabels, row: int, first_row: int) -> SampledImage:
    """Copy a row; `first_row` is the number of the shard's first row."""
    image = labels[row]
    return SampledImage(
        key=image.key,
        image_digest=image.image_digest,
        height=image.height,
        width=image.width,
        target=image.target,
        row=first_row + row,
        **{name: getattr(image, name).copy() for name in CROP_FIELDS},
    )


def priorities(labels: ShardLabels, seed: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Compute priorities in [0, 1): (R, N) of the crops, and (R,) of their images."""
    image = rng.mix64(rng.hashes64(labels.keys) ^ np.uint64(rng.hash64("report", seed)))
    crop = np.arange(labels.num_crops, dtype=np.uint64)[None]
    return rng.uniforms(rng.counter64(image[:, None], crop)), rng.uniforms(image)
