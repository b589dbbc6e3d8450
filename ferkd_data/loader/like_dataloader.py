"""The attributes of torch's DataLoader that training loops use, for loaders and data sets that replay labels."""

from __future__ import annotations

from typing import Any, NoReturn

from ferkd_data.errors import UsageError
from ferkd_data.label_set import LabelSet
from ferkd_data.loader.settings import LoaderSettings

TO_RESUME = (
    "To resume in the middle of an epoch, use the loader's state_dict and load_state_dict (HF Trainer: "
    "ignore_data_skip=True); for a DataLoader of your own there is CropDataset"
)


def class_names(labels: LabelSet) -> list[str]:
    """List the names of the classes that are trained on, or their numbers where they have no names."""
    names = labels.class_names
    return [str(number) for number in range(labels.num_classes)] if names is None else list(names)


def class_to_idx_of(labels: LabelSet) -> dict[str, int]:
    """Map each class name to its number; of classes with the same name, to the first."""
    # ImageNet has two classes named crane: the last entry of a dict wins, so the first number comes last.
    return {name: number for number, name in reversed(list(enumerate(class_names(labels))))}


def refuse_transform(transform: Any) -> NoReturn:
    """Raise UsageError for loops that set `dataset.transform`, as timm's create_loader does."""
    raise UsageError(
        f"crops are replayed as the teachers saw them; dataset.transform = {type(transform).__name__} cannot change "
        "that, and options such as --scale, --hflip, --aa, --color-jitter and --train-interpolation have no effect. "
        "Leave out what sets it; your own augmentation of replayed crops is transform=, when the data set is made"
    )


class LoaderDataset:
    """`loader.dataset`: the labelled images of a CropLoader, for loops that count them or want the classes.

    Holds no items: its images come from the loader, as batches.
    """

    def __init__(self, loader: DataLoaderLike) -> None:
        self._loader = loader

    @property
    def labels(self) -> LabelSet:
        return self._loader.labels

    def set_epoch(self, epoch: int) -> None:
        """Call `set_epoch` of the loader, for loops that tell their data set."""
        self._loader.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of labelled images."""
        return len(self.labels)

    @property
    def classes(self) -> list[str]:
        return class_names(self.labels)

    @property
    def class_to_idx(self) -> dict[str, int]:
        return class_to_idx_of(self.labels)

    @property
    def transform(self) -> Any:
        return self._loader.settings.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        refuse_transform(transform)

    def __getitem__(self, row: Any) -> NoReturn:
        """Refuse: a loop that builds a DataLoader of its own around the dataset asks it for items."""
        raise UsageError(f"a CropLoader gives whole batches; its dataset has no items. {TO_RESUME}")

    def __repr__(self) -> str:
        return f"LoaderDataset({len(self):,} images, {self.labels.num_classes:,} classes, {self.labels.location})"


class LoaderSampler:
    """`loader.sampler`: what loops call to begin an epoch."""

    def __init__(self, loader: DataLoaderLike) -> None:
        self._loader = loader

    def set_epoch(self, epoch: int) -> None:
        self._loader.set_epoch(epoch)

    def __len__(self) -> int:
        """Crops of an epoch, for this rank, as far as they fill batches."""
        return len(self._loader) * self._loader.batch_size

    def __iter__(self) -> NoReturn:
        """Refuse: a loop that builds a DataLoader of its own (Accelerate's skip_first_batches) asks it for rows."""
        raise UsageError(f"a CropLoader orders its images itself; its sampler can only set_epoch. {TO_RESUME}")


class LoaderBatchSampler(LoaderSampler):
    """`loader.batch_sampler`: counts batches, where a sampler counts crops."""

    def __len__(self) -> int:
        return len(self._loader)


class DataLoaderLike:
    """The attributes of torch's DataLoader that a CropLoader has too. They are for reading."""

    labels: LabelSet
    settings: LoaderSettings
    # For loops that inspect a DataLoader before they begin. Each says that there is nothing of the kind here.
    collate_fn = None
    generator = None
    worker_init_fn = None
    multiprocessing_context = None
    timeout = 0
    in_order = True
    # timm's train.py asks for it, and turns it off, with --mixup-off-epoch.
    mixup_enabled = False

    def set_epoch(self, epoch: int) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def dataset(self) -> LoaderDataset:
        """The labelled images: their number, and the classes."""
        return LoaderDataset(self)

    @property
    def sampler(self) -> LoaderSampler:
        """An object whose `set_epoch` is the loader's."""
        return LoaderSampler(self)

    @property
    def batch_sampler(self) -> LoaderBatchSampler:
        """A sampler that has the loader's number of batches as its length."""
        return LoaderBatchSampler(self)

    @property
    def batch_size(self) -> int:
        """Crops per batch and rank."""
        return self.settings.batch_size

    @property
    def num_workers(self) -> int:
        return self.settings.num_workers

    @property
    def prefetch_factor(self) -> int | None:
        # None without workers, as torch's DataLoader has it.
        return self.settings.prefetch_factor if self.settings.num_workers else None

    @property
    def persistent_workers(self) -> bool:
        # The workers of a CropLoader always outlive an epoch.
        return self.settings.num_workers > 0

    @property
    def drop_last(self) -> bool:
        return self.settings.drop_last

    @property
    def pin_memory(self) -> bool:
        return self.settings.pin_memory
