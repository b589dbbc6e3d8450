"""`CropDataset`: the loader's parts for those who keep their own DataLoader and sampler."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ferkd_data.calibration import CalibrationSetting
from ferkd_data.errors import UsageError
from ferkd_data.images import ImageSource
from ferkd_data.label_set import LabelSet
from ferkd_data.loader.crop_stream import CropStream, Item, with_ranks
from ferkd_data.loader.crops_and_targets import DiscardedCrops
from ferkd_data.loader.kinds import default_size
from ferkd_data.loader.like_dataloader import class_names, class_to_idx_of, refuse_transform
from ferkd_data.loader.opening import check_is_label_set, open_maker
from ferkd_data.loader.order import OrderKind, check_order
from ferkd_data.loader.ranks import Ranks, check_ranks, ranks_now, warn_if_alone
from ferkd_data.loader.readings import Numbered, NumberedSampler, Turns
from ferkd_data.loader.schedule import Cursor, Window
from ferkd_data.loader.settings import (
    ImagesMissing,
    LoaderSettings,
    OfEpoch,
    TargetsKind,
    Verify,
    counted,
    epoch_number,
)
from ferkd_data.loader.shared_epoch import SharedEpoch
from ferkd_data.loader.transform import Transform
from ferkd_data.replay import Interpolation, empty_batch
from ferkd_data.storage import default_cache_dir, local_path
from ferkd_data.targets import SoftTargets


class CropDataset(Dataset[Item]):
    """A map-style data set: `dataset[row]` is `(crops, targets)` of one image, uint8 (M, 3, S, S) and `SoftTargets`.

    Give `dataset.collate` to the DataLoader. Each reading of a row draws the row's next M crops, so that a DataLoader
    moves on from epoch to epoch by itself, also with workers. `set_epoch(e)` lets every row begin with the crops of
    epoch e: call it before each epoch where several processes train together, training may resume, or epochs may end
    early. With persistent workers, epochs that end early need `numbered(sampler)` as well. A reading is a pure function
    of (seed, key, number), its number in the row's order.

    >>> dataset = fd.CropDataset(fd.open_labels("labels-with-images"), crops_per_image=2, size=32)
    >>> crops, targets = dataset[0]
    >>> len(dataset), crops.shape, len(targets)
    (4, torch.Size([2, 3, 32, 32]), 2)

        dataset = fd.CropDataset(labels, images="imagenet/train")
        loader = DataLoader(dataset, batch_size=256, shuffle=True, collate_fn=dataset.collate, num_workers=8)
    """

    def __init__(
        self,
        labels: LabelSet,
        *,
        images: str | Path | ImageSource | None = None,
        crops_per_image: int = 1,
        repeats: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
        size: int | OfEpoch | None = None,
        interpolation: Interpolation = "bilinear",
        calibration: CalibrationSetting = "ferkd",
        seed: int = 0,
        verify_images: Verify = "first_epoch",
        images_missing: ImagesMissing = "raise",
        keys: bool = False,
        transform: Transform | None = None,
        targets: TargetsKind = "soft",
        cache_dir: str | Path | None = None,
    ) -> None:
        """
        repeats: how often the sampler gives a row in one epoch, for repeated augmentation (timm's RepeatAugSampler,
            torchvision's RASampler: 3 by default); all ranks together. Each time the row gives other crops.
        rank, world_size: which of these readings are this process's; those of torch.distributed by default, which must
            then be initialised before the data set is made. Without `repeats` they decide nothing.

        The other arguments are those of `CropLoader`. Raises UsageError and LabelSetError as it does.
        """
        check_is_label_set(labels)
        crops_per_image = counted("crops_per_image", crops_per_image)
        check_ranks(rank, world_size)
        ranks = ranks_now(rank, world_size)
        self.turns = Turns.of(counted("repeats", repeats), ranks)
        self._rank, self._world_size = rank, world_size
        if repeats > 1:
            # Every rank would take itself for the first, and give the crops that the others give.
            warn_if_alone(ranks, world_size)
        settings = LoaderSettings(
            # To the batch maker an epoch draws the crops of all turns; `item` takes one turn's slice of them.
            batch_size=crops_per_image * self.turns.count,
            crops_per_image=crops_per_image * self.turns.count,
            size=default_size(labels) if size is None else size,
            interpolation=interpolation,
            calibration=calibration,
            # Rows come in the order of the user's sampler; this setting only has to be one that shuffles nothing.
            order="sequential",
            seed=seed,
            verify_images=verify_images,
            images_missing=images_missing,
            keys=keys,
            transform=transform,
            targets=targets,
        )
        cache = local_path(cache_dir) if cache_dir else default_cache_dir()
        _, self._maker = open_maker(labels, images, settings, cache, at_random=True)
        self._crops_per_image = crops_per_image
        self._discarded = DiscardedCrops()
        self._shared = SharedEpoch(len(self), self.turns.per_rank)
        # In the main process, before a DataLoader's workers all ask for the same block.
        self._maker.prepare_blocks(0)

    def __len__(self) -> int:
        return len(self._maker.labels)

    @property
    def labels(self) -> LabelSet:
        """The labels of the images that are there."""
        return self._maker.labels

    @property
    def classes(self) -> list[str]:
        return class_names(self.labels)

    @property
    def class_to_idx(self) -> dict[str, int]:
        return class_to_idx_of(self.labels)

    @property
    def transform(self) -> Transform | None:
        return self._maker.settings.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        refuse_transform(transform)

    def __repr__(self) -> str:
        settings = self._maker.settings
        return (
            f"CropDataset({len(self):,} images, {self._crops_per_image} of {self.labels.num_crops} crops at a time, "
            f"size {settings.size}, epoch {self.epoch})\n  labels: {self.labels!r}"
        )

    @property
    def shared(self) -> SharedEpoch:
        """The state that the worker processes of this rank share."""
        return self._shared.of(self._ranks())

    def _ranks(self) -> Ranks:
        return ranks_now(self._rank, self._world_size)

    @property
    def epoch(self) -> int:
        """The epoch of the last `set_epoch`, else 0."""
        return self.shared.epoch

    def set_epoch(self, epoch: int) -> None:
        """Let every row begin with the first crops of this epoch; reaches worker processes that live on.

        Workers of a DataLoader read ahead. Where they are persistent and the last epoch was left early, they read what
        is left of it as part of this one, and those rows are one epoch ahead until the next call; rows of a `numbered`
        sampler are not.

        Raises UsageError for what is no epoch's number.
        """
        epoch = epoch_number(epoch)
        self.shared.set_epoch(epoch)
        self._maker.prepare_blocks(epoch)

    def __getitem__(self, row: int | Numbered) -> Item:
        """Raises LoaderError when the image cannot be used, IndexError beyond the last row, TypeError for no row."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int | Numbered]) -> list[Item]:
        """Return the items of several rows, as a DataLoader asks for a batch. A row may come more than once."""
        checked = [_checked(row, len(self)) for row in rows]
        # Counted for the whole batch under one lock, before anything is read.
        visits = self.shared.visit([row for row in checked if not isinstance(row, Numbered)])
        self._warn_if_ranks_count_apart(visits)
        counted = iter(visits)
        return [self.item(*row) if isinstance(row, Numbered) else self.item(row, *next(counted)) for row in checked]

    def _warn_if_ranks_count_apart(self, visits: Sequence[tuple[int, int]]) -> None:
        """Warn, once, where a rank's own count of a row's readings stands in for the epoch of a training of several."""
        ranks = self._ranks()
        if self.turns.repeats > 1 and 1 < ranks.world_size != self.turns.world_size:
            raise UsageError(
                f"this CropDataset was made before the process group of {ranks.world_size} processes: with repeats= "
                "they would all give the same crops. Make it afterwards, in each process, or give rank and world_size"
            )
        if ranks.world_size == 1 or self.turns.count > 1 or self.shared.calls:
            return
        if any(epoch for epoch, _ in visits) and self.shared.first_warning():
            warnings.warn(
                f"rank {ranks.rank} of {ranks.world_size} reads a row again, and set_epoch of the CropDataset was "
                "never called: ranks do not know what the others have read, so that a row repeats crops that it gave "
                "on another rank, and schedules by epoch lag behind. Call dataset.set_epoch(epoch) before each epoch, "
                "beside the sampler's set_epoch",
                stacklevel=3,
            )

    def __getstate__(self) -> dict[str, Any]:
        return with_ranks(self.__dict__, self._ranks())

    def numbered(self, sampler: Iterable[int]) -> NumberedSampler:
        """Return the sampler's rows, each with the number of its reading, counted where the sampler runs.

        Without it, worker processes count together. Where a row comes again in the next batch, chance decides which of
        two workers reads first; and persistent workers read what is left of an epoch that ended early as part of the
        next one. With it, batches do not depend on the workers. Its `set_epoch` is that of the sampler and of the data
        set.

            sampler = dataset.numbered(RandomSampler(dataset))
            loader = DataLoader(dataset, sampler=sampler, persistent_workers=True, ...)
        """
        return NumberedSampler(self, sampler)

    def item(self, row: int, epoch: int, number: int = 0) -> Item:
        """Return the crops and targets of a row when it is read for the `number`-th time (from 0) in an epoch."""
        ahead, turn = self.turns.turn(number)
        epoch, crops = epoch + ahead, self._crops_per_image
        at = self._maker.epochs.at(epoch)
        images = empty_batch(crops, at.size)
        slots = np.full((1, at.shape.crops_per_image), -1)
        # Crops of other turns keep slot -1: they are drawn, so that draws agree over turns, and not cut.
        slots[0, turn * crops : (turn + 1) * crops] = np.arange(crops)
        window = Window(epoch=epoch, positions=np.array([row]), slots=slots, batches=(crops,), cursors=(Cursor(),))
        made = self._maker.make(window, images)
        # Each worker counts its own crops.
        self._discarded.add(crops, made.num_discarded)
        targets = self._maker.targets(made)
        return images, targets.dense() if self._maker.settings.targets == "dense" else targets

    def stream(
        self,
        *,
        order: OrderKind = "global",
        shards_together: int = 8,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> CropStream:
        """Return the same items as an iterable data set, in the order of an epoch.

        `order`, `shards_together`, `rank` and `world_size` as in `CropLoader`, but no order unpacks less: labels are
        unpacked by whole crop blocks, as for the data set itself. The stream begins with the epoch of `set_epoch`, and
        each iteration over it is another epoch.

        Raises UsageError for a data set with `repeats`, since a stream gives each image once in an epoch.
        """
        if self.turns.repeats > 1:
            raise UsageError(
                f"a stream gives each image once in an epoch, so repeats={self.turns.repeats} would leave crops out: "
                "make a CropDataset without repeats for it"
            )
        check_ranks(rank, world_size)
        check_order(order)
        return CropStream(self, self._maker, order, shards_together, rank, world_size)

    @staticmethod
    def collate(items: list[Item]) -> Item:
        """Join images and targets of several rows to one batch; an image's crops stay side by side.

        Raises UsageError for crops of several sizes.
        """
        images, targets = [images for images, _ in items], [targets for _, targets in items]
        sizes = sorted({part.shape[-1] for part in images})
        if len(sizes) > 1:
            raise UsageError(
                f"crops of {' and '.join(map(str, sizes))} pixels do not go into one batch: where size is a function "
                "of the epoch, call set_epoch before each epoch, and give repeats= for a sampler that repeats rows. "
                "Where workers are persistent and an epoch was left early, give the DataLoader "
                "sampler=dataset.numbered(sampler): they still read rows of the epoch that was left, and only such a "
                "sampler sends the epoch with each row"
            )
        joined = torch.cat(images, out=_shared_batch(images))
        return joined, torch.cat(targets) if isinstance(targets[0], Tensor) else SoftTargets.cat(targets)


def _shared_batch(images: Sequence[Tensor]) -> Tensor | None:
    """Allocate shared memory for a batch of these crops where a worker joins them; None elsewhere.

    The DataLoader would copy the batch there otherwise. For the batch and not for each image: shared memory takes one
    of the files that a process may have open.
    """
    size = images[0].shape[-1]
    # A data set around this one may have made something else of the crops.
    are_crops = all(part.dtype == torch.uint8 and part.shape[1:] == (3, size, size) for part in images)
    if get_worker_info() is None or not are_crops:
        return None
    return empty_batch(sum(map(len, images)), size, shared=True)


def _checked(row: int | Numbered, num_rows: int) -> int | Numbered:
    # `index` refuses 0.5, of which int() would make row 0; tensors and NumPy's integers pass.
    number = row.row if isinstance(row, Numbered) else operator.index(row)
    if not 0 <= number < num_rows:
        raise IndexError(f"row {number} of {num_rows}")
    return row if isinstance(row, Numbered) else number
