"""Every image's key by its row, in files that are memory-mapped: for batches that carry keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ferkd_data.label_set import LabelSet
from ferkd_data.scratch import Scratch

TEXT_NAME = "keys.txt"
BOUNDS_NAME = "bounds.npy"


class KeyTable:
    """Keys of a label set. Can be pickled as long as the original exists, which removes `folder` with itself."""

    def __init__(self, labels: LabelSet) -> None:
        """Raises ShardError as `LabelSet.keys` does."""
        self._scratch = Scratch("keys")
        self.folder = self._scratch.path
        lengths = [np.zeros(1, np.int64)]
        with (self.folder / TEXT_NAME).open("wb") as text:
            for entry in labels.filled_shards():
                keys = [key.encode() for key in labels.keys_of(entry.index)]
                text.write(b"".join(keys))
                lengths.append(np.fromiter(map(len, keys), np.int64, len(keys)))
        np.save(self.folder / BOUNDS_NAME, np.cumsum(np.concatenate(lengths)))
        self._open()

    def take(self, rows: Tensor) -> tuple[str, ...]:
        """The keys of these rows, int64 (B,)."""
        at = rows.cpu().numpy()
        bounds = zip(self._bounds[at].tolist(), self._bounds[at + 1].tolist(), strict=True)
        return tuple(self._text[start:stop].tobytes().decode() for start, stop in bounds)

    def _open(self) -> None:
        self._bounds: npt.NDArray[np.int64] = np.load(self.folder / BOUNDS_NAME, mmap_mode="r", allow_pickle=False)
        self._text: npt.NDArray[np.uint8] = np.memmap(self.folder / TEXT_NAME, np.uint8, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
