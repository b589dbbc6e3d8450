"""Images with the same bytes, found by their digests in bounded memory.

Up to a million images all digests are compared. Beyond that only those whose last bits are 0 are: a random share of
the *digests*, so that both copies of an image are in it or neither is, and counts can be scaled up.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ferkd_data.shards.columns import ShardLabels

DIGESTS_KEPT = 2**20
DTYPE = np.dtype([("digest", "<u8"), ("row", "<i8"), ("target", "<i4")])


class Duplicates:
    def __init__(self, capacity: int = DIGESTS_KEPT) -> None:
        self._capacity = capacity
        self._kept = np.empty(0, DTYPE)
        self._waiting: list[npt.NDArray[np.void]] = []
        self._num_waiting = 0
        self._bits = 0
        self._row = 0

    def add(self, labels: ShardLabels) -> None:
        """Rows are numbered in the order in which shards are added."""
        found = np.empty(len(labels), DTYPE)
        found["digest"] = np.ascontiguousarray(labels.image_digest[:, :8]).view("<u8")[:, 0]
        found["row"] = np.arange(self._row, self._row + len(labels))
        found["target"] = labels.target
        self._row += len(labels)
        # A digest of zeros stands for an image that was not hashed.
        found = found[labels.image_digest.any(axis=1)]
        self._waiting.append(found[self._chosen(found)])
        self._num_waiting += len(self._waiting[-1])
        if len(self._kept) + self._num_waiting > self._capacity:
            self._shrink()

    @property
    def share(self) -> float:
        """Of all digests, those that were compared."""
        return float(2.0**-self._bits)

    def groups(self) -> list[npt.NDArray[np.void]]:
        """The rows of each image that comes more than once among the digests compared, in row order."""
        self._gather()
        order = np.lexsort((self._kept["row"], self._kept["digest"]))
        ranked = self._kept[order]
        starts = np.flatnonzero(np.concatenate([[True], ranked["digest"][1:] != ranked["digest"][:-1]]))
        groups = [part for part in np.split(ranked, starts[1:]) if len(part) > 1]
        return sorted(groups, key=lambda part: int(part["row"][0]))

    def _gather(self) -> None:
        self._kept = np.concatenate([self._kept, *self._waiting])
        self._waiting, self._num_waiting = [], 0

    def _shrink(self) -> None:
        self._gather()
        while len(self._kept) > self._capacity:
            self._bits += 1
            self._kept = self._kept[self._chosen(self._kept)]

    def _chosen(self, found: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        chosen: npt.NDArray[np.bool_] = (found["digest"] & np.uint64(2**self._bits - 1)) == 0
        return chosen
