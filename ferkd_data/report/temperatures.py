"""Fit the temperature at which the mean largest probability of the stored soft labels equals their accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.labels.rows import UNKNOWN_TARGET, ShardLabels
from ferkd_data.targets import recover

CROPS_KEPT = 20_000
"""Size of the sample; the error of a mean over it is about half a percent."""
LEAST_CROPS = 200
"""Crops below which nothing is fitted."""
COLDEST, HOTTEST, STEPS = 0.2, 5.0, 24
"""Range of T, and number of bisections of log T; the remaining range is far below the two digits that are shown."""


class TemperatureSample:
    """A uniform sample of crops with a ground truth, in memory that does not grow with the label set."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._rank = np.empty(0)
        self._prob = np.empty((0, 0), np.float16)
        self._right = np.empty(0, np.bool_)

    def add(self, labels: ShardLabels, rank: npt.NDArray[np.float64]) -> None:
        """Add a shard's crops, of which those with the smallest `rank` (R, N) of all shards are kept."""
        known = np.broadcast_to((labels.target != UNKNOWN_TARGET)[:, None], labels.flip.shape)
        right = labels.class_index[..., 0] == labels.target[:, None]
        self._rank = np.concatenate([self._rank, rank[known]])
        prob = labels.class_prob[known]
        self._prob = np.concatenate([self._prob, prob]) if len(self._prob) else prob
        self._right = np.concatenate([self._right, right[known]])
        if len(self._rank) > CROPS_KEPT:
            # The smallest ranks of all shards so far: a uniform sample, whatever the order of the shards.
            kept = np.argpartition(self._rank, CROPS_KEPT)[:CROPS_KEPT]
            self._rank, self._prob, self._right = self._rank[kept], self._prob[kept], self._right[kept]

    def fitted(self) -> float | None:
        """Find T for which the mean largest probability equals the share of crops named right.

        None with too few crops, or where no T between 0.2 and 5 does. The mean falls as T rises, so bisection finds it.
        """
        if len(self._rank) < LEAST_CROPS:
            return None
        right = float(self._right.mean())
        # Bisection needs the two ends on either side.
        if not self._sureness(HOTTEST) < right < self._sureness(COLDEST):
            return None
        # In log T: halving and doubling are equal steps.
        low, high = np.log(COLDEST), np.log(HOTTEST)
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._sureness(float(np.exp(middle))) > right else (low, middle)
        return float(np.exp((low + high) / 2))

    def _sureness(self, temperature: float) -> float:
        weight, floor = recover(self._prob, num_classes=self._num_classes, temperature=temperature)
        # A sparse weight is what a class has above the floor.
        largest: npt.NDArray[Any] = weight[:, 0] + floor
        return float(largest.mean())
