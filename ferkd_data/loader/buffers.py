"""Memory for batches, used again as soon as nobody looks at the batch any more.

Fresh memory costs a page fault for every 4 KiB: for uint8 crops, a tenth of the time that cutting them takes. Buffers
are shared with the workers, which write crops straight into them; only labels travel back.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ferkd_data.replay import empty_batch


class BatchBuffers:
    """Buffers of one size. There are as many as batches are in work or in the user's hands at once."""

    def __init__(self, num_crops: int, size: int, *, shared: bool) -> None:
        self._num_crops = num_crops
        self._size = size
        self._shared = shared
        self._free: list[Tensor] = []

    def take(self) -> Tensor:
        """A buffer uint8 (num_crops, 3, S, S) that nobody uses."""
        return self._free.pop() if self._free else empty_batch(self._num_crops, self._size, shared=self._shared)

    def lend(self, buffer: Tensor, num_crops: int) -> Tensor:
        """Its first crops as a tensor of their own; the buffer is free when that and all views of it are gone."""
        array = buffer.permute(0, 2, 3, 1)[:num_crops].numpy()
        weakref.finalize(array, self._free.append, buffer)
        return torch.from_numpy(array).permute(0, 3, 1, 2)
