"""Crops and images picked out of a label set by a rule that depends on the seed and their keys alone.

Each crop has a priority, a hash of (seed, key, crop number); of every group those with the smallest priorities are
kept. So the same label set gives the same samples, in whatever order its shards are read, and memory stays flat.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.shards.columns import CROP_FIELDS, ImageLabels, ShardLabels

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledImage(ImageLabels):
    """A row of its own memory, with its place in the label set."""

    row: int
    """Row number, counted over the shards in the order in which they were added."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Crop:
    """One crop with all that is known of it."""

    image: SampledImage
    number: int

    @property
    def p_max(self) -> float:
        return float(self.image.class_prob[self.number, 0])

    @property
    def top1(self) -> int:
        return int(self.image.class_index[self.number, 0])


class Smallest(Generic[Item]):
    """Keeps the `capacity` items of the smallest ranks, whatever the order in which they come."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # The largest rank on top. Keys break ties, so that items are never compared.
        self._heap: list[tuple[float, str, int, int, Item]] = []
        self._seen = 0

    @property
    def bound(self) -> float:
        """An item of this rank or a larger one would not be kept."""
        if len(self._heap) < self._capacity:
            return float("inf")
        return -self._heap[0][0] if self._heap else float("-inf")

    def add(self, rank: float, key: str, number: int, make: Callable[[], Item]) -> None:
        if rank < self.bound:
            # A damaged label set may hold a key twice; the count keeps items from being compared then too.
            self._seen += 1
            entry = (-rank, key, number, self._seen, make())
            if len(self._heap) < self._capacity:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)

    def items(self) -> list[Item]:
        """The smallest rank first."""
        return [entry[4] for entry in sorted(self._heap, key=lambda entry: (-entry[0], entry[1], entry[2]))]


class CropSample:
    """Of each group, `capacity` crops of the smallest priorities."""

    def __init__(self, num_groups: int, capacity: int) -> None:
        self._capacity = capacity
        self._groups = [Smallest[Crop](capacity) for _ in range(num_groups)]

    def add(
        self, labels: ShardLabels, first_row: int, priority: npt.NDArray[np.float64], group: npt.NDArray[np.int64]
    ) -> None:
        """`priority` and `group` are (R, N); crops whose group is negative belong to none."""
        bounds = np.array([kept.bound for kept in self._groups] + [-1.0])
        alive = np.flatnonzero(priority < bounds[np.maximum(group, -1)])
        groups, ranks = group.reshape(-1)[alive], priority.reshape(-1)[alive]
        for number in np.unique(groups).tolist():
            here = np.flatnonzero(groups == number)
            if len(here) > self._capacity:
                here = here[np.argpartition(ranks[here], self._capacity)[: self._capacity]]
            for at in alive[here].tolist():
                row, crop = divmod(at, labels.num_crops)
                make = _maker(labels, row, crop, first_row)
                self._groups[number].add(float(priority[row, crop]), labels.keys[row], crop, make)

    def crops(self) -> list[list[Crop]]:
        """By group, the smallest priority first."""
        return [group.items() for group in self._groups]


def _maker(labels: ShardLabels, row: int, crop: int, first_row: int) -> Callable[[], Crop]:
    return lambda: Crop(image=sampled(labels, row, first_row), number=crop)


def sampled(labels: ShardLabels, row: int, first_row: int) -> SampledImage:
    """A copy of a row, which does not keep its shard in memory; `first_row` is the number of the shard's first row."""
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
    """In [0, 1): (R, N) of the crops and (R,) of their images."""
    image = rng.mix64(rng.hashes64(labels.keys) ^ np.uint64(rng.hash64("report", seed)))
    crop = np.arange(labels.num_crops, dtype=np.uint64)[None]
    return rng.uniforms(rng.counter64(image[:, None], crop)), rng.uniforms(image)
