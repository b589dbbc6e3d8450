"""Memory for batches, used again as soon as nobody looks at the batch any more.

Fresh memory costs a page fault for every 4 KiB: for uint8 crops, a tenth of the time that cutting them takes. So
workers map one piece of shared memory when they start and write crops straight into its slots; only labels travel.
"""

from __future__ import annotations

import weakref
from typing import TypeAlias

import torch
from torch import Tensor

from ferkd_data.errors import LoaderError
from ferkd_data.replay import empty_batch

Slot: TypeAlias = "int | Tensor"
"""Of a window's crops: the number of a slot, or memory of its own where all slots are taken."""


class BatchBuffers:
    """Slots of one size, uint8 (num_crops, 3, S, S) each. Can be handed to worker processes when they start."""

    def __init__(self, num_crops: int, size: int, *, slots: int, shared: bool) -> None:
        self._num_crops = num_crops
        self._size = size
        self._shared = shared
        try:
            self._slots = empty_batch(slots * num_crops, size, shared=shared)
        except RuntimeError as error:
            megabytes = slots * num_crops * size**2 * 3 / 1e6
            raise LoaderError(
                f"{slots} batches of {num_crops} crops take {megabytes:,.0f} MB of shared memory, which are not there "
                f"({str(error).splitlines()[0]}); give the container more (docker run --shm-size), or lower "
                "num_workers, prefetch_factor, batch_size or spread"
            ) from error
        self._free = list(range(slots))

    def take(self) -> Slot:
        """A slot that nobody uses, or fresh memory when the user holds on to too many batches."""
        return self._free.pop() if self._free else empty_batch(self._num_crops, self._size, shared=self._shared)

    def at(self, slot: Slot) -> Tensor:
        """The memory itself, in whichever process."""
        if isinstance(slot, Tensor):
            return slot
        return self._slots[slot * self._num_crops : (slot + 1) * self._num_crops]

    def give_back(self, slot: Slot) -> None:
        if isinstance(slot, int):
            self._free.append(slot)

    def lend(self, slot: Slot, num_crops: int) -> Tensor:
        """Its first crops as a tensor of their own; a slot is free again when that and all views of it are gone."""
        array = self.at(slot)[:num_crops].permute(0, 2, 3, 1).numpy()
        weakref.finalize(array, self.give_back, slot)
        return torch.from_numpy(array).permute(0, 3, 1, 2)
