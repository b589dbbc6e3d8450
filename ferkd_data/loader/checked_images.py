"""Which images have been compared with those labelled, so that each is hashed once and not in every epoch."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt


class CheckedImages:
    """A bit for each row of a label set: its image was found to be the one that was labelled.

    Only good images have theirs set, so a wrong one is found again in every epoch, by whichever process reads it, and
    after a resume. The bits are shared with processes that are forked; a copy that travels by pickle begins anew. Two
    processes that set bits of one byte at once may lose one, and that image is hashed once more.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._bits: npt.NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, num_rows // 8 + 1), np.uint8)

    def __contains__(self, row: int) -> bool:
        return bool(self._bits[row >> 3] >> (row & 7) & 1)

    def add(self, row: int) -> None:
        self._bits[row >> 3] |= np.uint8(1 << (row & 7))

    def __getstate__(self) -> dict[str, Any]:
        return {"num_rows": self._num_rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
