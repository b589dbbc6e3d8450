"""A `CropDataset` as an iterable data set, in the order of an epoch, dealt out to ranks and workers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ferkd_data.errors import UsageError
from ferkd_data.loader.batch_maker import BatchMaker
from ferkd_data.loader.order import OrderKind, Rows, epoch_order
from ferkd_data.loader.ranks import Ranks, ranks_now, warn_if_alone
from ferkd_data.loader.settings import epoch_number
from ferkd_data.loader.shared_epoch import RunTokens, SharedEpoch

Item = tuple[Tensor, Any]
"""Crops of an image, and their targets: SoftTargets, or a tensor (M, C) where dense ones are asked for."""
ROWS_AT_ONCE = 256
"""Rows of a stream whose order is worked out together."""


class Items(Protocol):
    """The parts of a CropDataset that a stream needs."""

    def __len__(self) -> int: ...

    @property
    def shared(self) -> SharedEpoch: ...

    def item(self, row: int, epoch: int) -> Item: ...


class CropStream(IterableDataset[Item]):
    """Made by `CropDataset.stream`. Every image of an epoch once, dealt out to ranks and their DataLoader's workers.

    Each worker makes batches of its own share. So an epoch of a DataLoader with W workers may have up to W - 1 batches
    more than its len(), which PyTorch takes from the number of images, or fewer with drop_last.

    Each iteration is the next epoch, for all workers of a DataLoader together; `set_epoch` says which one is next.
    Ranks get disjoint images, equally many: of N images, N % world_size are left out of an epoch. Workers interleave,
    so that, unlike with `CropLoader`, what is in a batch depends on their number.
    """

    def __init__(
        self,
        dataset: Items,
        maker: BatchMaker,
        order: OrderKind,
        shards_together: int,
        rank: int | None,
        world_size: int | None,
    ) -> None:
        self.dataset, self._maker = dataset, maker
        self._order, self._shards_together = order, shards_together
        self._rank, self._world_size = rank, world_size
        self._shared = SharedEpoch(0)
        # An epoch of its own: readings of the data set itself and iterations of the stream do not move each other on.
        self._shared.follow(dataset.shared)
        self._tokens = RunTokens()

    def __len__(self) -> int:
        """Images of an epoch, for this rank."""
        return len(self.dataset) // self._ranks().world_size

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch; reaches worker processes that live on."""
        epoch = epoch_number(epoch)
        self._shared.of(self._ranks()).set_epoch(epoch)
        self._maker.prepare_blocks(epoch)

    def __iter__(self) -> Iterator[Item]:
        # Not a generator: the epoch is settled here, when all workers begin, and not with the first item.
        ranks = self._ranks()
        warn_if_alone(ranks, self._world_size)
        if ranks.world_size > 1 and _is_dealt_out_by_accelerate(self):
            raise UsageError(
                "Accelerate (also in HF Trainer) deals this stream's images out to the processes, and so does the "
                "stream itself: an epoch would have a part of them. Leave its DataLoader out of accelerator.prepare"
            )
        return self._items(self._shared.of(ranks).begin_run(self._tokens.next(), self.dataset.shared), ranks)

    def _items(self, epoch: int, ranks: Ranks) -> Iterator[Item]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        # len // world_size for every rank, so that all get equally many images and none waits for another.
        mine = range(first, len(self.dataset) // ranks.world_size, step)
        for start in range(0, len(mine), ROWS_AT_ONCE):
            positions = np.array(mine[start : start + ROWS_AT_ONCE]) * ranks.world_size + ranks.rank
            for row in self._rows(epoch, positions).tolist():
                yield self.dataset.item(row, epoch)

    def _rows(self, epoch: int, positions: Rows) -> Rows:
        """Return the rows at these positions of an epoch."""
        shard_rows = [shard.rows for shard in self._maker.labels.manifest.shards]
        seed = self._maker.settings.seed
        order = epoch_order(self._order, shard_rows, seed=seed, epoch=epoch, shards_together=self._shards_together)
        return order.rows(positions)

    def _ranks(self) -> Ranks:
        return ranks_now(self._rank, self._world_size)

    def __getstate__(self) -> dict[str, Any]:
        return with_ranks(self.__dict__, self._ranks())


def with_ranks(state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Fix the ranks in a pickled state, for worker processes, in which torch.distributed is not initialised.

    A process alone may also send its data set to processes that are ranks themselves, as `mp.spawn` does.
    """
    return {**state, **({"_rank": ranks.rank, "_world_size": ranks.world_size} if ranks.world_size > 1 else {})}


def _is_dealt_out_by_accelerate(stream: CropStream) -> bool:
    """Return whether the loader that Accelerate iterates over now reads this stream, by itself or in a shard."""
    state: Any = sys.modules.get("accelerate.state")
    active = None if state is None else getattr(state.GradientState(), "active_dataloader", None)
    dataset = getattr(active, "dataset", None)
    return dataset is stream or getattr(dataset, "dataset", None) is stream
