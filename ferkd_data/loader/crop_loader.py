"""`CropLoader`: batches of replayed crops with their calibrated targets, for any training loop."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ferkd_data.calibration import CalibrationSetting
from ferkd_data.errors import LoaderError, UsageError
from ferkd_data.images import ImageSource
from ferkd_data.label_set import LabelSet, VerifyLabels
from ferkd_data.loader.batch_maker import BatchMaker, Made
from ferkd_data.loader.clocks import EpochClock
from ferkd_data.loader.crops_and_targets import DiscardedCrops
from ferkd_data.loader.device_decode import DeviceWorkers, open_device
from ferkd_data.loader.kinds import by_kind, crops_of_batch
from ferkd_data.loader.like_dataloader import DataLoaderLike
from ferkd_data.loader.opening import check_is_label_set, open_maker
from ferkd_data.loader.order import OrderKind
from ferkd_data.loader.ranks import Ranks, ranks_now, warn_if_alone
from ferkd_data.loader.schedule import (
    Cursor,
    EpochShape,
    Position,
    Window,
    count_batches,
    settled,
    windows,
)
from ferkd_data.loader.settings import (
    DecodeScale,
    EpochKind,
    ImagesMissing,
    LoaderSettings,
    OfEpoch,
    OnError,
    TargetsKind,
    Verify,
    epoch_number,
)
from ferkd_data.loader.state import read_state, saved_state, settings_that_must_fit
from ferkd_data.loader.stats import LoaderStats, log_stats, stats_of
from ferkd_data.loader.transform import Transform
from ferkd_data.loader.workers import Workers
from ferkd_data.replay import Interpolation
from ferkd_data.selfmix import SelfMix
from ferkd_data.storage import default_cache_dir, local_path
from ferkd_data.targets import SoftTargets

SHOWN = (
    "batch_size",
    "crops_per_image",
    "kinds",
    "size",
    "calibration",
    "num_workers",
    "targets",
    "rank",
    "world_size",
)
"""Settings that a loader's repr always shows, or shows resolved."""


@dataclass
class _Iteration:
    """One iteration over a loader, which its iterator owns."""

    start: Cursor
    whole: int
    """Batches of the epoch from its start."""
    left: int
    """Batches still to give."""
    clock: EpochClock
    process: int
    """The process that began it."""


class CropLoader(DataLoaderLike):
    """Batches of replayed crops: iterating gives `(images, targets)`, uint8 (B, 3, S, S) channels last and SoftTargets.

    An epoch has `len(loader)` batches, however a loop ends it; each iteration is the next epoch, and only after
    `load_state_dict` the rest of one. The same seed gives the same batches with any number of workers.

    >>> loader = fd.CropLoader(fd.open_labels("labels-with-images"), batch_size=4, crops_per_image=2, size=32)
    >>> len(loader)
    2
    >>> images, targets = next(iter(loader))
    >>> images.shape, images.dtype
    (torch.Size([4, 3, 32, 32]), torch.uint8)
    >>> targets
    SoftTargets(4 rows, 6 classes, 3 sparse entries, float32 on cpu, with hard, hard_partner, bucket, rows)

    In a training:

        loader = fd.CropLoader(fd.open_labels("labels"), images="imagenet/train", batch_size=1024, num_workers=8)
        for epoch in range(75):
            loader.set_epoch(epoch)
            for images, targets in loader:
                loss = fd.soft_cross_entropy(model(fd.normalize(images)), targets)

    It stands where a DataLoader stood: it has its attributes, takes its ranks from torch.distributed, and must not be
    wrapped in a DataLoader.
    """

    def __init__(
        self,
        labels: LabelSet,
        *,
        images: str | Path | ImageSource | None = None,
        batch_size: int,
        crops_per_image: int | OfEpoch | None = None,
        kinds: Mapping[str, int] | None = None,
        size: int | OfEpoch | Mapping[str, int] | None = None,
        epoch: EpochKind = "images",
        interpolation: Interpolation = "bilinear",
        calibration: CalibrationSetting = "ferkd",
        selfmix: SelfMix | None = None,
        spread: bool | int = False,
        order: OrderKind = "global",
        shards_together: int = 8,
        drop_last: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        decode_device: str | torch.device | None = None,
        decode_scale: DecodeScale = "exact",
        verify_images: Verify = "first_epoch",
        verify_labels: VerifyLabels | None = None,
        on_error: OnError = "raise",
        images_missing: ImagesMissing = "raise",
        keys: bool = False,
        transform: Transform | None = None,
        targets: TargetsKind = "soft",
        to_batch: Callable[[Any, Any], Any] | None = None,
        log_stats: bool = False,
        cache_dir: str | Path | None = None,
    ) -> None:
        """
        images: a folder, tars or Parquet (see `open_source`), joined with the labels by key; None for a label set of
            layout webdataset, which has its own.
        batch_size: crops per batch and rank, B; a multiple of crops_per_image, M. With `kinds`, crops of the first
            kind.
        crops_per_image, size: numbers, or functions of the epoch that give one. crops_per_image: 4 by default. size:
            the side of a crop in pixels, by default 224, or that of the kind for a label set of one crop kind.
        kinds: crops per image of each crop kind in a batch, such as {"global": 2, "local": 6}, of a label set that was
            built with crop kinds. Images and targets are then dicts by kind, and `size` may be a dict that replaces the
            size of some of them. See docs/crop_kinds.md.
        epoch: "images": an epoch is one pass over the images, and so trains on M crops of each. "crops": an epoch is as
            many crops as there are images, so that each image comes in one of M epochs. See docs/epochs.md.
        interpolation: bilinear is Pillow's within a grey level. bicubic may differ from Pillow's by 7 levels, which
            moves a teacher's probabilities by up to 0.02 (docs/teachers.md).
        calibration: a Calibration, a function of the epoch that returns one, or the name of a preset.
        selfmix: mixes crops of one image within the batch; needs spread=False and M >= 2.
        spread: decode an image once, but put its M crops into M different batches out of a window of this many
            (True: 2 * M). A worker holds `spread * batch_size` crops of 3 * size**2 bytes for each window in work.
        order: global: any image may follow any other; a crop block is unpacked as a whole first. shards: shards in
            random order, `shards_together` at a time; sequential: as the label set has them. These two read shard by
            shard, and fetch the next ones in the background.
        rank, world_size: by default those of torch.distributed, looked up when an iteration begins. Each rank gets its
            own part of an epoch's images. Say 0 and 1 to train each process on everything.
        pin_memory: copy images and targets to page-locked memory, from which a GPU fetches without waiting
            (`non_blocking=True`). It is done in the training process, a batch at a time; without a GPU there is none.
        drop_last: leave out the last, incomplete batch. False: it is shorter, the same on all ranks; up to
            world_size - 1 images come twice.
        decode_device: "cuda": JPEGs are decoded, cut and mixed there by this process, workers only read and label, and
            the images of batches lie there. Pixels differ a little (see docs/loader.md). "cpu" tries the same path.
        decode_scale: "auto": a large JPEG is decoded at 1/2, 1/4 or 1/8 of its sides where each crop drawn of it still
            has twice the pixels of `size` then. Pixels differ from those that were labelled (see docs/loader.md).
        verify_images: when the images' digests are compared with those labelled; their sizes always are.
        verify_labels: first_read: the SHA-256 of each label file is compared with the manifest when the file is first
            read or unpacked; never: it is not. None: as `labels` were opened (first_read, unless you said otherwise).
        on_error: what an image that cannot be used does. raise: LoaderError. skip: another image of the epoch takes its
            place (and so comes twice in it); `skipped` counts it, and the first one is warned of. Batches stay full.
        images_missing: what labelled images that `images` lacks do: raise LabelSetError, or be dropped for good: the
            loader has the labels of the others only (`loader.labels`), and a warning says how many were dropped.
        keys: give each crop's image key in `targets.keys`; a file of all keys is written to the temporary folder.
        transform: your own augmentation, a function from uint8 (3, S, S) to the same. It runs in the workers, one crop
            at a time, with the generators of torch, NumPy and `random` seeded for each. See docs/transform.md.
        targets: "soft" gives SoftTargets; "dense" gives plain float32 tensors (B, C), for losses and mixing of PyTorch,
            torchvision and timm as they are. Dense targets know no ground truth, rows or keys.
        to_batch: a function of (images, targets) that returns what the loop wants, such as a dictionary. It runs in the
            training process.
        log_stats: log one line at the end of each epoch, with the logger "ferkd_data.loader" at level INFO: speed, the
            share of the time that the training waited, and the bottleneck. `stats()` has more.
        cache_dir: where crop blocks are unpacked; by default $FERKD_DATA_CACHE or the user's cache folder.

        Raises UsageError for settings that cannot be right, LabelSetError when images and labels do not match.
        """
        check_is_label_set(labels)
        labels = labels if verify_labels is None else labels.verified(verify_labels)
        self.settings = LoaderSettings(
            batch_size=batch_size,
            **crops_of_batch(labels, kinds, crops_per_image, size),
            epoch=epoch,
            interpolation=interpolation,
            calibration=calibration,
            selfmix=selfmix,
            spread=spread,
            order=order,
            shards_together=shards_together,
            drop_last=drop_last,
            seed=seed,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            pin_memory=pin_memory,
            decode_device=decode_device,
            decode_scale=decode_scale,
            verify_images=verify_images,
            on_error=on_error,
            images_missing=images_missing,
            keys=keys,
            transform=transform,
            targets=targets,
            log_stats=log_stats,
        )
        if to_batch is not None and not callable(to_batch):
            raise UsageError(f"to_batch must be a function of images and targets, got {to_batch!r}")
        self._to_batch = to_batch
        self.skipped = 0
        """Number of images left out so far, with on_error="skip"."""
        self.skipped_last: list[str] = []
        """Key and reason of each image left out of the window that the last batch is from."""
        cache = local_path(cache_dir) if cache_dir else default_cache_dir()
        self.labels, self._maker = open_maker(labels, images, self.settings, cache)
        # Checked here as well as in each iteration, so that a batch_size that leaves no batch fails where it was given.
        self._check_not_empty(0)
        self._position = Position()
        # Without a GPU it is left undone, as torch's DataLoader does: the same script runs on both kinds of machine.
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._decode_device = None if decode_device is None else open_device(decode_device)
        # Started by the first iteration: a loader that is only asked for its length or its repr costs no processes.
        self._workers: Workers | DeviceWorkers | None = None
        self._workers_process = 0
        """The process that started them."""
        self._warned = False
        self._lengths_reported: set[int] = set()
        """Every number of batches that len() has given."""
        self._running: _Iteration | None = None
        """The iteration that may go on: somebody holds its iterator, also when that has given its last batch."""
        self._discarded = DiscardedCrops()
        self._clock: EpochClock | None = None
        """The clock of the iteration that began last."""

    def __len__(self) -> int:
        """Batches of an epoch from its start, for this rank: the one under way, else the one that comes next.

        An epoch is over with its last batch, once `set_epoch` has asked for another.
        """
        # A schedule of the learning rate that is made before the process group would have too many steps.
        self._warn_if_alone(self._ranks())
        count = self._length()
        self._lengths_reported.add(count)
        return count

    def _length(self) -> int:
        run = self._running
        over = run is None or (not run.left and self._position.is_requested)
        epoch = self._start().epoch if run is None or over else run.start.epoch
        return self._count(Cursor(epoch=epoch))

    def _start(self) -> Cursor:
        """Return the cursor at which an iteration that begins now begins."""
        # Settled for the ranks of now: a state may have been loaded before the process group was there.
        return self._settled(self._position.start())

    def _ranks(self) -> Ranks:
        """Return this process's rank and their number, now."""
        return ranks_now(self.settings.rank, self.settings.world_size)

    def _warn_if_alone(self, ranks: Ranks) -> None:
        if not self._warned:
            self._warned = True
            warn_if_alone(ranks, self.settings.world_size)

    def _shape(self, epoch: int) -> EpochShape:
        return self._maker.epochs.at(epoch).shape

    def _count(self, cursor: Cursor) -> int:
        """Count the batches from a cursor to the end of its epoch."""
        return count_batches(self._shape(cursor.epoch), cursor, world_size=self.world_size)

    def _check_not_empty(self, epoch: int) -> None:
        if not self._count(Cursor(epoch=epoch)):
            shape, settings = self._shape(epoch), self.settings
            remedy = "use a smaller batch_size, or drop_last=False"
            if not shape.num_images:
                remedy = 'epoch="crops" needs at least crops_per_image images: use fewer crops, or epoch="images"'
            raise UsageError(
                f"{shape.num_images} images x {shape.crops_per_image} crops make no batch of {settings.batch_size} "
                f"for each of {self.world_size} ranks in epoch {epoch}; {remedy}"
            )

    def __repr__(self) -> str:
        settings, shape = self.settings, self._shape(self.epoch)
        different = [
            f"{field.name}={getattr(settings, field.name)!r}"
            for field in fields(settings)
            if field.name not in SHOWN and getattr(settings, field.name) != field.default
        ]
        ranks = f", rank {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        by_kind = [f"{kind.crops_per_image} {kind.name} of {kind.size} px" for kind in settings.kinds]
        lines = [
            f"CropLoader: epoch {self.epoch} of {self._length():,} batches{ranks}",
            f"  batches: {settings.batch_size // shape.crops_per_image:,} images with {', '.join(by_kind)} each"
            if by_kind
            else f"  batches: {settings.batch_size:,} crops of {self._maker.epochs.at(self.epoch).size} px, "
            f"{shape.crops_per_image} of each image",
            f"  images:  {shape.num_images:,} in this epoch, each with {self.labels.num_crops} labelled crops",
            f"  labels:  {self.labels!r}",
            f"  targets: {settings.targets}, calibration {settings.calibration!r}",
            f"  workers: {settings.num_workers}",
        ]
        return "\n".join(lines + ([f"  also:    {', '.join(different)}"] if different else []))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process: a copy starts workers of its own, with the next epoch."""
        own = {"_position": copy.copy(self._position), "_discarded": copy.copy(self._discarded)}
        return {**self.__dict__, "_workers": None, "_running": None, "_clock": None, **own}

    def __getitem__(self, index: Any) -> NoReturn:
        """Refuse: a DataLoader that wraps this loader asks it for items."""
        raise UsageError(
            "CropLoader gives whole batches and has workers of its own (num_workers=...): iterate over it as it is, "
            "without a torch DataLoader around it; CropDataset is for a DataLoader of your own"
        )

    @property
    def rank(self) -> int:
        """This process's number among those that train together, now."""
        return self._ranks().rank

    @property
    def world_size(self) -> int:
        """The number of processes that train together, now: each gets its own part of an epoch's images."""
        return self._ranks().world_size

    @property
    def epoch(self) -> int:
        """The epoch of the next batch: after an epoch's last batch, that of the epoch to come."""
        return self._settled(self._position.cursor).epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration begin at the start of this epoch; an iteration that is under way is not disturbed.

        A state that was loaded in the middle of this same epoch, and has not been continued yet, stays in force.
        Raises UsageError for what is no epoch's number.
        """
        self._position.set_epoch(epoch_number(epoch))

    def __iter__(self) -> Iterator[Any]:
        """A whole epoch of `len(loader)` batches or, after `load_state_dict`, the rest of the one that was saved.

        An iterator begins with its first batch. It begins the epoch that `set_epoch` asked for, else the one after the
        epoch that was begun last, however far that came. Once it has begun, earlier iterators over the same loader
        raise LoaderError unless they have given all their batches.
        """
        # Looked up now, not in __init__: a script may make its loader before it initialises torch.distributed.
        ranks = self._ranks()
        run = self._begin(ranks)
        try:
            for window, images, made in self._windows(run.start, ranks):
                sizes = [sum(kinds) for kinds in zip(*(kind.batches for kind in made.kinds), strict=True)]
                run.clock.add_window(
                    images=len(window.positions), crops=sum(sizes), spent=made.spent, by_worker=made.by_worker
                )
                for (batch, cursor), crops in zip(self._split(made, window, images), sizes, strict=True):
                    # Before the batch is given: a state that is saved while the loop works on it must go on with the
                    # next one.
                    self._position.advance(cursor)
                    run.left -= 1
                    run.clock.give(crops)
                    yield batch
                    run.clock.enter("hand_over")
                    # The workers now make windows of the later iteration, and this one's were dropped (`Pool.run`). One
                    # that has given all its batches ends normally.
                    if self._running is not run:
                        if not run.left:
                            return
                        raise LoaderError("this iteration ended when another one over the same loader began")
                    # Its batches lie in memory of the process that began it, which goes on using that.
                    if run.process != os.getpid():
                        raise LoaderError(
                            "this iteration was begun before a fork, by the parent of this process; begin another one"
                        )
                run.clock.enter("wait")
        finally:
            # Also where a loop leaves early, as soon as nobody holds the iterator.
            self._end(run, ranks)

    def _begin(self, ranks: Ranks) -> _Iteration:
        """Begin an iteration. Where it cannot begin, this raises and leaves the loader where it was."""
        asked, start = self._position.start(), self._start()
        self._warn_if_alone(ranks)
        self._check_not_empty(start.epoch)
        if start.epoch != asked.epoch:
            warnings.warn(
                f"the state that was loaded leaves no batch of epoch {asked.epoch} for {ranks.world_size} ranks: epoch "
                f"{start.epoch} begins. Load a state after torch.distributed is initialised, and loader.epoch tells",
                stacklevel=3,
            )
        left, whole = self._count(start), self._count(Cursor(epoch=start.epoch))
        # The clock runs from here, so that unpacking crop blocks counts as "prepare".
        clock = EpochClock(start.epoch, left)
        # Before workers ask for the blocks: all would wait for the one that unpacks.
        self._maker.prepare_blocks(start.epoch)
        # Only now, since everything above may raise.
        self._position.begin(start)
        self._running, self._clock = _Iteration(start, whole, left, clock, os.getpid()), clock
        self._maker.clock.take()  # What an iteration that failed has left behind.
        clock.enter("wait")
        return self._running

    def _end(self, run: _Iteration, ranks: Ranks) -> None:
        """End an iteration, at its last batch or earlier: warn of an epoch cut short, and log where its time went.

        May run as the interpreter ends, when nothing can be imported or looked up any more.
        """
        run.clock.enter(None)
        if not run.left:
            self._discarded.judge()
        given = run.whole - run.left
        if given in self._lengths_reported - {run.whole}:
            _warn_of_cut_epoch(run.start.epoch, run.whole, given)
        if self.settings.log_stats:
            log_stats(stats_of(run.clock.times(), self.settings), ranks)
        # Otherwise a later iteration has begun.
        if self._running is run:
            self._running = None

    def stats(self) -> LoaderStats:
        """Return where the time of the current epoch goes or, between epochs, that of the last one: see `LoaderStats`.

        Always measured, for less than 1 % of the loading time. Each iteration begins anew; states have none of it.

            print(loader.stats())
        """
        clock = self._clock
        if clock is None:
            epoch = self._start().epoch
            clock = EpochClock(epoch, self._count(Cursor(epoch=epoch)))
            clock.enter(None)
        return stats_of(clock.times(), self.settings)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch given, with the settings that must fit: small, and plain JSON.

        After an epoch's last batch that is the start of the next epoch.
        """
        cursor = self._position.cursor
        return saved_state(cursor, self._must_fit(cursor.epoch))

    def next_window(self) -> tuple[BatchMaker, Window]:
        """The window that the next batch comes from, and a maker of its own that makes it. The loader does not move.

        The maker reads the same labels and images as this loader, and shares nothing with it that changes.
        """
        if self.settings.kinds:
            raise UsageError(
                "a loader of several crop kinds has no single next window; make a loader of one kind, "
                f"labels.crop_kind({self.settings.kinds[0].name!r})"
            )
        maker = self._maker.alone()
        cursor = self._start() if self._running is None else self._position.cursor
        maker.prepare_blocks(cursor.epoch)
        ranks = self._ranks()
        return maker, next(windows(self._shape(cursor.epoch), cursor, rank=ranks.rank, world_size=ranks.world_size))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on with exactly the next batch; the number of workers and of ranks may differ.

        An iteration under way ends: asked for another batch, it raises LoaderError.
        Raises StateMismatchError that names both values when the state is of other labels or settings, or says what is
        wrong with it when it is no state that a loader saved.
        """
        self._position.resume(self._settled(read_state(state, self._must_fit, self._shape)))
        # The iteration under way ends: its batches are not those that the state goes on with.
        self._running = None

    def _settled(self, cursor: Cursor) -> Cursor:
        """Return the start of the next epoch for a cursor within an epoch that has no batch left for these ranks."""
        # An epoch that has none from its start is an error when it begins.
        if cursor == Cursor(epoch=cursor.epoch):
            return cursor
        return settled(self._shape(cursor.epoch), cursor, world_size=self.world_size)

    def _split(self, made: Made, window: Window, images: Sequence[Tensor]) -> Iterator[tuple[Any, Cursor]]:
        """Yield the window's batches, each with the cursor after it. `images` has the crops of each kind."""
        if made.skipped and not self.skipped:
            warnings.warn(
                f"{made.skipped[0]}: left out, and another image of the epoch takes its place (on_error='skip'); "
                "`loader.skipped` counts further ones",
                stacklevel=3,
            )
        for kind in made.kinds:
            self._discarded.add(sum(kind.batches), kind.num_discarded)
        self.skipped += len(made.skipped)
        self.skipped_last = made.skipped
        targets = [self._maker.targets(kind) for kind in made.kinds]
        bounds = [np.cumsum([0, *kind.batches]).tolist() for kind in made.kinds]
        for number, cursor in enumerate(window.cursors):
            rows = [slice(*ends[number : number + 2]) for ends in bounds]
            batch = self._batch(
                [part[own] for part, own in zip(images, rows, strict=True)],
                [part[own] for part, own in zip(targets, rows, strict=True)],
            )
            yield batch, self._settled(cursor)

    def _batch(self, images: Sequence[Tensor], targets: Sequence[SoftTargets]) -> Any:
        """Convert the crops and targets of each kind to what the user asked for: `targets`, then `to_batch`."""
        wanted: Sequence[Any] = [part.dense() for part in targets] if self.settings.targets == "dense" else targets
        if self._pin_memory:
            # A batch at a time: a window of many would stand between two steps. Images on a device need none.
            images = [part.pin_memory() if part.device.type == "cpu" else part for part in images]
            wanted = [part.pin_memory() for part in wanted]
        kinds = self.settings.kinds
        pair = (by_kind(kinds, images), by_kind(kinds, wanted)) if kinds else (images[0], wanted[0])
        return pair if self._to_batch is None else self._to_batch(*pair)

    def _windows(self, start: Cursor, ranks: Ranks) -> Iterator[tuple[Window, tuple[Tensor, ...], Made]]:
        """The windows from `start` to the end of its epoch in order, each with the crops of each kind."""
        planned = windows(self._shape(start.epoch), start, rank=ranks.rank, world_size=ranks.world_size)
        yield from self._open_workers().make(planned)

    def _open_workers(self) -> Workers | DeviceWorkers:
        # A forked copy would write into the batches of its parent, whose memory it shares.
        if self._workers is None or self._workers_process != os.getpid():
            self._workers_process = os.getpid()
            processes = (self.settings.num_workers, self.settings.prefetch_factor)
            if self._decode_device is not None:
                self._workers = DeviceWorkers(self._maker, self._decode_device, *processes)
            else:
                self._workers = Workers(self._maker, *processes)
        return self._workers

    def _must_fit(self, epoch: int) -> dict[str, Any]:
        return settings_that_must_fit(self.labels, self.settings, self._maker.epochs.at(epoch))


def _warn_of_cut_epoch(epoch: int, whole: int, given: int) -> None:
    """Warn where a loop left an epoch after as many batches as another one has: it asked for the length too early.

    Lightning and HF Trainer ask for it once, before the first epoch, and end each epoch after so many batches.
    """
    warnings.warn(
        f"epoch {epoch} has {whole} batches and was left after {given}, the length of another epoch: does the loop ask "
        'for len(loader) only once? Epochs of equal length need epoch="crops", or a crops_per_image that does not '
        "change",
        stacklevel=3,
    )
