"""`CropDataset`: the loader's parts for those who keep their own DataLoader and sampler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ferkd_data.calibration import Schedule
from ferkd_data.errors import UsageError
from ferkd_data.images import ImageSource
from ferkd_data.label_set import LabelSet
from ferkd_data.loader.augment import Transform
from ferkd_data.loader.batch_maker import Work
from ferkd_data.loader.opening import open_maker
from ferkd_data.loader.order import OrderKind, Rows, check_order, epoch_order
from ferkd_data.loader.plan import Place, Window
from ferkd_data.loader.settings import ImagesMissing, LoaderSettings, OfEpoch, Verify
from ferkd_data.replay import Interpolation, empty_batch
from ferkd_data.storage import default_cache_dir
from ferkd_data.targets import SoftTargets

Item = tuple[Tensor, SoftTargets]
ROWS_AT_ONCE = 256
"""Whose order a stream works out together."""


class CropDataset(Dataset[Item]):
    """Map-style: `dataset[row]` is `(crops, targets)` of one image, uint8 (M, 3, S, S) and `SoftTargets` of M rows.

    Give `dataset.collate` to the DataLoader, and call `set_epoch` before each epoch: it decides which crops are drawn,
    and reaches workers that live on. Items are a pure function of (seed, key, epoch).
    """

    def __init__(
        self,
        labels: LabelSet,
        *,
        images: str | Path | ImageSource | None = None,
        crops_per_image: int = 1,
        size: int | OfEpoch = 224,
        interpolation: Interpolation = "bilinear",
        calibration: Schedule = "ferkd",
        seed: int = 0,
        verify_images: Verify = "first_epoch",
        images_missing: ImagesMissing = "raise",
        keys: bool = False,
        transform: Transform | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        """The arguments are those of `CropLoader`. Raises UsageError and LabelSetError as it does."""
        settings = LoaderSettings(
            batch_size=crops_per_image,
            crops_per_image=crops_per_image,
            size=size,
            interpolation=interpolation,
            calibration=calibration,
            order="sequential",
            seed=seed,
            verify_images=verify_images,
            images_missing=images_missing,
            keys=keys,
            transform=transform,
        )
        cache = Path(cache_dir) if cache_dir else default_cache_dir()
        self._maker = open_maker(labels, images, settings, cache, at_random=True)
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._maker.prepare_blocks(0)

    def __len__(self) -> int:
        return len(self._maker.labels)

    def set_epoch(self, epoch: int) -> None:
        if epoch < 0:
            raise UsageError(f"epoch must not be negative, got {epoch}")
        self._epoch[0] = epoch
        self._maker.prepare_blocks(epoch)

    def __getitem__(self, row: int) -> Item:
        """Raises LoaderError when the image cannot be used, IndexError beyond the last row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        epoch = int(self._epoch[0])
        shape = self._maker.epochs.at(epoch)
        crops = shape.crops_per_image
        images = empty_batch(crops, shape.size, shared=get_worker_info() is not None)
        window = Window(
            epoch=epoch,
            positions=np.array([row]),
            slots=np.arange(crops)[None],
            batches=(crops,),
            places=(Place(),),
        )
        made = self._maker.make(Work(window, images))
        return images, self._maker.targets(made)

    def stream(
        self,
        *,
        order: OrderKind = "global",
        shards_together: int = 8,
        rank: int = 0,
        world_size: int = 1,
    ) -> CropStream:
        """The same items as an iterable data set, in the order of an epoch; `order` as in `CropLoader`."""
        if not 0 <= rank < world_size:
            raise UsageError(f"rank must be 0..{world_size - 1}, got {rank}")
        check_order(order)
        return CropStream(self, order, shards_together, rank, world_size)

    def rows_of_epoch(self, positions: Rows, order: OrderKind, shards_together: int) -> Rows:
        """The rows at these positions of the present epoch."""
        shard_rows = [shard.rows for shard in self._maker.labels.manifest.shards]
        seed, epoch = self._maker.settings.seed, int(self._epoch[0])
        return epoch_order(order, shard_rows, seed=seed, epoch=epoch, shards_together=shards_together).rows(positions)

    @staticmethod
    def collate(items: list[Item]) -> Item:
        """Images and targets of several rows as one batch; an image's crops stay side by side."""
        return torch.cat([images for images, _ in items]), SoftTargets.cat([targets for _, targets in items])


class CropStream(IterableDataset[Item]):
    """Made by `CropDataset.stream`. Every image of an epoch once, dealt out to ranks and their DataLoader's workers.

    Ranks get disjoint images, equally many: of N images, N % world_size are left out of an epoch. Workers interleave,
    so that, unlike with `CropLoader`, what is in a batch depends on their number.
    """

    def __init__(
        self, dataset: CropDataset, order: OrderKind, shards_together: int, rank: int, world_size: int
    ) -> None:
        self.dataset = dataset
        self._order, self._shards_together = order, shards_together
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.dataset) // self._world_size

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = range(first, len(self), step)
        for start in range(0, len(mine), ROWS_AT_ONCE):
            positions = np.array(mine[start : start + ROWS_AT_ONCE]) * self._world_size + self._rank
            for row in self.dataset.rows_of_epoch(positions, self._order, self._shards_together).tolist():
                yield self.dataset[row]
