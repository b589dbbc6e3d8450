"""Make the batches of a window: read, decode, draw, cut, calibrate and mix, in whichever process.

`BatchMaker` holds what does not change in a training. Given a window of the schedule and memory for its crops, it fills
the memory and returns the targets. Nothing that it returns depends on the process or on windows made before.

Where a loader gives several crop kinds, each kind has a maker of its own, and the first one leads: it reads and decodes
an image once, and every maker cuts its crops out of it.

Legend: I images of a window, M crops per image, B crops of a batch, S output side.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data import rng
from ferkd_data.crops import Crops
from ferkd_data.errors import FerkdError, ImageError, LoaderError, OutOfMemoryError, UsageError
from ferkd_data.images import image_size
from ferkd_data.images.decode import decode_reduced, divisor_for, reduced_crops
from ferkd_data.images.retrying import IMAGES_IN_A_ROW, UnansweredImageError
from ferkd_data.label_set import LabelSet
from ferkd_data.label_set.joined_images import (
    CheckedImages,
    check_labelled_size,
    decode_checked,
    give_memory_back,
    labelled_pixels,
    labelled_size,
)
from ferkd_data.loader.clocks import NOTHING, Spent, StageClock
from ferkd_data.loader.crops_and_targets import (
    BlockDraws,
    Drawn,
    draw_seed,
    draw_stored_crops,
    epoch_draws,
    window_targets,
)
from ferkd_data.loader.epochs import Epochs, EpochSettings
from ferkd_data.loader.images_and_keys import Images, KeyTable
from ferkd_data.loader.label_cache import LabelCache
from ferkd_data.loader.order import FromPosition, InChunks, epoch_order
from ferkd_data.loader.schedule import Window, stand_in
from ferkd_data.loader.settings import LoaderSettings, without_functions
from ferkd_data.loader.streaming import StreamedLabels
from ferkd_data.loader.transform import Transform, crop_seed, lent_generators, transformed
from ferkd_data.replay import one_thread, replay
from ferkd_data.storage import image_digest
from ferkd_data.targets import TENSORS, SoftTargets

MAX_SKIPPED = 1000
"""Images in a row that may be unusable. More mean that the source is gone, or the labels are of other images."""


class Made(NamedTuple):
    """The targets of a window's crops, and how many crops of its memory are filled.

    NumPy, because a tensor would travel between processes through a file of shared memory of its own.
    """

    arrays: dict[str, npt.NDArray[Any]]
    """The tensors of `SoftTargets`, by name."""
    batches: list[int]
    """Crops in each batch."""
    skipped: list[str]
    """Key and reason of each image of the window that could not be used, and was replaced by another one."""
    num_discarded: int = 0
    """Crops that were drawn though the calibration discards them (see `Drawn.discarded`)."""
    spent: Spent = NOTHING
    """Seconds that making it took, by stage."""
    by_worker: bool = False
    """Whether a worker made it, and not the training process."""
    others: tuple[Made, ...] = ()
    """Targets and crops of each further crop kind."""

    @property
    def kinds(self) -> tuple[Made, ...]:
        """The targets and crops of all kinds; of one where there are no kinds."""
        return (self, *self.others)

    @classmethod
    def of(cls, targets: SoftTargets, window: Window, skipped: list[str]) -> Made:
        """Hold the window's targets, on the CPU, batch after batch."""
        # `numpy()` shares the tensor's memory and copies nothing; `targets` below makes tensors of it again.
        arrays = {name: tensor.numpy() for name in TENSORS if (tensor := getattr(targets, name)) is not None}
        return cls(arrays, list(window.batches), skipped)

    def targets(self, num_classes: int) -> SoftTargets:
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        return SoftTargets(num_classes=num_classes, **tensors)


class Labelled(NamedTuple):
    """The labels of a window's crops, before any image is read. The leading axis of arrays is I."""

    rows: npt.NDArray[np.int64]
    records: npt.NDArray[np.void]
    drawn: Drawn
    targets: list[SoftTargets]
    """One for each batch of the window, in the order of the slots."""
    others: tuple[Labelled, ...] = ()
    """The labels of each further crop kind, of the same images."""

    def num_discarded(self, window: Window) -> int:
        """Count the crops of the window that were drawn though the calibration discards them."""
        return int((self.drawn.discarded & (window.slots >= 0)).sum())

    def crops(self, i: int) -> Crops:
        """Return the crops drawn of image i, as labelled."""
        drawn = self.drawn
        return Crops(boxes=drawn.boxes[i], flip=drawn.flip[i], operations=drawn.operations[i])


class CutPlan(NamedTuple):
    """A window and the memory that its crops go into."""

    window: Window
    images: Tensor
    """uint8 (sum of the window's batches, 3, S, S)."""
    together: npt.NDArray[np.bool_]
    """(I,) whether all of an image's crops are wanted, and lie side by side."""

    @classmethod
    def of(cls, window: Window, out: Tensor) -> CutPlan:
        # A slot has room for a whole window. An epoch's last window, and the rest of one after a resume, are shorter.
        # Images whose crops go side by side, which is all of them unless batches are spread, take one call of the
        # cutter each.
        together = (window.slots[:, 0] >= 0) & (np.diff(window.slots, axis=1) == 1).all(axis=1)
        return cls(window, out[: sum(window.batches)], together)


class BatchMaker:
    """Makes windows. `make` is a pure function of the window and the settings, whichever process calls it.

    Only `Made.spent`, the time that it took, differs from call to call. A maker is used by one thread at a time: it
    keeps open files, the order of the present pass and a clock between windows.
    """

    def __init__(
        self,
        labels: LabelSet,
        cache: LabelCache | StreamedLabels,
        images: Images,
        settings: LoaderSettings,
        keys: KeyTable | None = None,
        others: Sequence[BatchMaker] = (),
    ) -> None:
        """`cache` is that of `labels.unmapped`: records hold the teacher's classes, as stored.

        `others` make the further crop kinds of the same images, and are led by this maker from now on.
        """
        self.keys = keys
        self.others = tuple(others)
        self.labels = labels
        self.cache = cache
        self.images = images
        self.settings = settings
        self.clock = StageClock()
        self._share_clock()
        self._checked = CheckedImages(len(labels))
        self._newest = -1
        """The latest epoch so far; a later one lets go of crop blocks that it does not draw from."""
        self.epochs = Epochs(settings, len(labels))
        self._draw_seed = draw_seed(labels, settings.seed)
        self._order: tuple[int, InChunks] | None = None
        # Looked up once, since they are asked for with each image and window.
        self._pixel_limit, self._crops_per_block = labels.manifest.pixel_limit, labels.manifest.block_crops(0)
        self._shard_rows = np.array([shard.rows for shard in labels.manifest.shards], np.int64)

    def make(self, window: Window, *outs: Tensor) -> Made:
        """Fill memory with the window's crops and return their targets.

        `outs` are uint8 (at least the sum of the window's batches, 3, S, S), one for each crop kind.
        Raises LoaderError where an image cannot be used and must not be skipped.
        """
        makers = (self, *self.others)
        plans = [CutPlan.of(maker.window_of(window), out) for maker, out in zip(makers, outs, strict=True)]

        def cut(labelled: Labelled, i: int) -> None:
            kinds = list(zip(makers, plans, (labelled, *labelled.others), strict=True))
            data = self.read(int(labelled.rows[i]), labelled.records[i])
            with self.clock.decode:
                # The image is decoded once for all kinds, so the one that needs most pixels decides how far it may be
                # reduced.
                divisor = min(maker._divisor(plan, part, i) for maker, plan, part in kinds)
                pixels, divisor = self._decoded(data, labelled.records[i], divisor)
            for maker, plan, part in kinds:
                maker._cut(plan, part, i, pixels, divisor)

        with one_thread():
            labelled, skipped = self.filled(window, cut)
            made = [
                maker.finish(plan.window, plan.images, part.targets, skipped)._replace(
                    num_discarded=part.num_discarded(plan.window)
                )
                for maker, plan, part in zip(makers, plans, (labelled, *labelled.others), strict=True)
            ]
        return made[0]._replace(spent=self.clock.take(), others=tuple(made[1:]))

    def window_of(self, window: Window) -> Window:
        """Return the leading kind's window for the kind of this maker: the same images, with M crops of this kind."""
        own = self.epochs.at(window.epoch).shape.crops_per_image
        count, leading = window.slots.shape
        if own == leading:
            return window
        # With several kinds nothing is spread, and so every window is one batch with all crops of its images.
        slots = np.arange(count * own).reshape(count, own)
        return replace(window, slots=slots, batches=tuple(batch // leading * own for batch in window.batches))

    def epoch_settings(self, epoch: int) -> EpochSettings:
        """Return the settings of an epoch for workers, evaluated, with those of the further kinds."""
        others = tuple(maker.epochs.at(epoch) for maker in self.others)
        return replace(self.epochs.at(epoch), others=others)

    def learn(self, epoch: int, settings: EpochSettings) -> None:
        """Take over the settings that another process has evaluated, for all kinds."""
        for maker, own in zip((self, *self.others), (settings, *settings.others), strict=True):
            maker.epochs.learn(epoch, own)

    def shapes(self, settings: EpochSettings) -> tuple[tuple[int, int], ...]:
        """Return (crops of a whole window, S) for each kind: the memory that a window of this epoch needs."""
        return tuple((own.shape.spread * own.shape.batch_size, own.size) for own in (settings, *settings.others))

    def _share_clock(self) -> None:
        for maker in self.others:
            # One clock for all: their work is one window's, and its stages are reported together.
            maker.clock = self.clock

    def for_workers(self) -> BatchMaker:
        """Return a copy to pickle for processes, which are told the settings of each epoch by `epochs.learn`.

        Functions of the epoch stay here, as they may not be picklable.
        """
        # Shallow: labels, cache and images leave out what belongs to this process when they are pickled.
        maker = copy.copy(self)
        maker.settings = without_functions(self.settings)
        maker.epochs = Epochs(maker.settings, len(self.labels))
        # A worker works out the order again. Rows become keys in the training (`targets`), so the table stays there.
        maker._order = maker.keys = None
        maker.clock = StageClock()
        maker.others = tuple(other.for_workers() for other in self.others)
        maker._share_clock()
        return maker

    def alone(self, **changes: Any) -> BatchMaker:
        """Return a maker of its own for the same labels and images, with some settings changed.

        It shares nothing with this one that changes, and gives no keys.
        """
        # Pickled as for a worker: what is open or mapped stays behind, and the copies open their own files.
        labels, cache, images = pickle.loads(pickle.dumps((self.labels, self.cache, self.images)))
        return BatchMaker(labels, cache, images, replace(self.settings, **changes))

    def filled(self, window: Window, use: Callable[[Labelled, int], None]) -> tuple[Labelled, list[str]]:
        """Use every image of a window; return its labels, and the key and reason of each image that was skipped.

        `use(labelled, i)` uses image i of the window, and raises ImageError where it cannot. With on_error="skip",
        another image of the epoch then replaces it (see `stand_in`). So a batch is always full, and its content depends
        on its window alone.

        Raises LoaderError where no image may be skipped, or MAX_SKIPPED in a row cannot be used.
        """
        labelled = self.labelled(window)
        skipped = failed = self._use(labelled, range(len(window.positions)), use)
        # A copy: each attempt counts from the window's own positions, so every process tries the same images.
        positions, attempt = window.positions.copy(), 0
        shape = self.epochs.at(window.epoch).shape
        num_images, step = shape.num_images, shape.spread * shape.batch_images
        # Images in use stay in their slots. Their labels are made again with the others', and are the same, since a
        # draw depends on the image's key and the epoch alone.
        while failed:
            attempt += 1
            # num_images attempts have tried every image of the epoch (see `stand_in`).
            if attempt == min(num_images, MAX_SKIPPED):
                last = next(iter(failed.values()))
                raise LoaderError(
                    f"{attempt:,} images in a row cannot be used; the last is {last}; is the image source still there?"
                )
            for i in failed:
                first = int(window.positions[i])
                positions[i] = stand_in(first, attempt, step, num_images=num_images)
            labelled = self.labelled(replace(window, positions=positions))
            failed = self._use(labelled, failed, use)
        return labelled, list(skipped.values())

    def _use(self, labelled: Labelled, images: Iterable[int], use: Callable[[Labelled, int], None]) -> dict[int, str]:
        """Use these images of a window. Maps each one that cannot be used, by its number, to its key and the reason."""
        failed, unanswered = {}, 0
        for i in images:
            try:
                use(labelled, i)
                unanswered = 0
            except OutOfMemoryError as error:
                # No fault of the image, so it is not skipped.
                raise LoaderError(f"{self._describe(int(labelled.rows[i]))}: {error}") from error
            except ImageError as error:
                failed[i] = self._skip(int(labelled.rows[i]), error)
                # In a row, as in a build: a few bad sectors are no source that is gone.
                unanswered = unanswered + 1 if isinstance(error, UnansweredImageError) else 0
                if unanswered == IMAGES_IN_A_ROW:
                    raise LoaderError(f"the source of the images does not answer: {failed[i]}") from error
        return failed

    def labelled(self, window: Window) -> Labelled:
        """Read the labels of a window: its crops, with their targets before any mixing."""
        with self.clock.label:
            order = self._order_of(window.epoch)
            rows = order.rows(window.positions)
            draws = self._draws(window.epoch)
        with self.clock.read:
            # Timed as reading, also where they come out of a map: pages that are not in memory are read from the disk.
            records = self._records(window, order, rows, draws)
        with self.clock.label:
            calibration = self.epochs.at(window.epoch).calibration
            drawn = draw_stored_crops(self.labels, records, draws, calibration=calibration, seed=self._draw_seed)
            target = records[0]["target"]
            targets = window_targets(self.labels, window, drawn, rows=rows, target=target, calibration=calibration)
        others = tuple(maker.labelled(maker.window_of(window)) for maker in self.others)
        return Labelled(rows, records[0], drawn, targets, others)

    def _records(
        self, window: Window, order: FromPosition, rows: npt.NDArray[np.int64], draws: tuple[BlockDraws, ...]
    ) -> list[npt.NDArray[np.void]]:
        """Read the stored labels of these rows in each block that is drawn from."""
        blocks = {part.block for part in draws}
        if window.epoch > self._newest:
            self._newest = window.epoch
            self.cache.forget_except(blocks)
        # A LabelCache maps whole blocks: any row may come next, and no shard has to be announced.
        needed = None
        if isinstance(self.cache, StreamedLabels):
            needed = order.needed_shards(window.positions)
            self.cache.prefetch(needed, blocks)
        self.images.prefetch(needed)
        return [self.cache.take(part.block, rows) for part in draws]

    def finish(self, window: Window, images: Tensor, targets: list[SoftTargets], skipped: list[str]) -> Made:
        """Mix `images` in place, on any device, and join the targets."""
        # On a GPU, the time to queue the kernels: the device works on while the training goes on.
        with self.clock.mix:
            self._mix(window, images, targets)
        return Made.of(targets[0] if len(targets) == 1 else SoftTargets.cat(targets), window, skipped)

    def targets(self, made: Made) -> SoftTargets:
        """Return a window's targets as users get them, with keys where they want them; of the first kind."""
        targets = made.targets(self.labels.num_classes)
        if self.keys is None or targets.rows is None:
            return targets
        return replace(targets, keys=self.keys.take(targets.rows))

    def prepare_blocks(self, epoch: int) -> None:
        """Unpack the crop blocks of an epoch before workers ask for them."""
        for maker in (self, *self.others):
            maker.cache.prepare({part.block for part in maker._draws(epoch)})
        give_memory_back()

    def _order_of(self, epoch: int) -> FromPosition:
        part = self.epochs.at(epoch)
        # By pass, not by epoch: with epoch="crops", the M epochs of a pass are consecutive pieces of one order.
        if self._order is None or self._order[0] != part.pass_number:
            settings = self.settings
            order = epoch_order(
                settings.order,
                self._shard_rows,
                seed=settings.seed,
                epoch=part.pass_number,
                shards_together=settings.shards_together,
            )
            self._order = (part.pass_number, InChunks(order, len(self.labels)))
        return FromPosition(self._order[1], part.first)

    def _draws(self, epoch: int) -> tuple[BlockDraws, ...]:
        part = self.epochs.at(epoch)
        return epoch_draws(
            part.drawn,
            crops_per_image=part.shape.crops_per_image,
            num_crops=self.labels.num_crops,
            crops_per_block=self._crops_per_block,
        )

    def _skip(self, row: int, error: ImageError) -> str:
        """Return key and reason of an image that is skipped. Raises LoaderError where none may be."""
        image = self._describe(row)
        if self.settings.on_error == "raise":
            raise LoaderError(f"{image}: {error}") from error
        return f"{image}: {error}"

    def _divisor(self, plan: CutPlan, labelled: Labelled, i: int) -> int:
        """Return the fraction 1/n of its sides at which image i of the window may be decoded for its crops."""
        if self.settings.decode_scale == "exact":
            return 1
        # All crops, also those given before a resume: the others have the same pixels then.
        return divisor_for(labelled.drawn.boxes[i], plan.images.shape[-1])

    def _decoded(self, data: bytes, record: np.void, divisor: int) -> tuple[npt.NDArray[np.uint8], int]:
        """Decode an image, (H, W, 3), at 1/divisor of its sides where its format can do that; returns what it did."""
        labelled, pixel_limit = labelled_size(record), self._pixel_limit
        if divisor > 1:
            # From the header, since the reduced picture no longer tells which size it had.
            check_labelled_size(image_size(data, max_pixels=labelled_pixels(labelled, pixel_limit)), labelled)
            pixels = decode_reduced(data, divisor)
            # None for what is no JPEG, or one that cannot be reduced.
            if pixels is not None:
                return pixels, divisor
        return decode_checked(data, labelled, pixel_limit), 1

    def _cut(self, plan: CutPlan, labelled: Labelled, i: int, pixels: npt.NDArray[np.uint8], divisor: int) -> None:
        """Cut the crops of image i of the window, decoded at 1/divisor of its sides, into their places."""
        crops, window = labelled.crops(i), plan.window
        if divisor > 1:
            crops = reduced_crops(crops, divisor, *pixels.shape[:2])
        try:
            with self.clock.cut:
                self._cut_image(pixels, window.slots[i], crops, bool(plan.together[i]), plan.images)
        except UsageError as error:
            # A box outside the image. For replay it is its caller's mistake; here it is one of the label.
            raise LoaderError(f"{self._describe(int(labelled.rows[i]))}: {error}") from error
        if self.settings.transform is not None:
            with self.clock.transform:
                self._transform(self.settings.transform, window, labelled, i, plan.images)

    def _cut_image(
        self, pixels: npt.NDArray[np.uint8], slots: npt.NDArray[np.int64], crops: Crops, together: bool, out: Tensor
    ) -> None:
        size, interpolation = out.shape[-1], self.settings.interpolation
        if together:
            first = int(slots[0])
            replay(pixels, crops, size=size, interpolation=interpolation, out=out[first : first + len(slots)])
            return
        for m, slot in enumerate(slots.tolist()):
            # -1: a crop that is not wanted of this window, such as one given before a resume.
            if slot >= 0:
                one = crops[m : m + 1]
                replay(pixels, one, size=size, interpolation=interpolation, out=out[slot : slot + 1])

    def _transform(self, transform: Transform, window: Window, labelled: Labelled, i: int, images: Tensor) -> None:
        """Apply the user's transform to the crops of image i of the window, in `images` itself."""
        # `drawn + m` counts an image's draws over the whole training: no two of them get the same random numbers.
        key_hash, drawn = int(labelled.records[i]["key_hash"]), self.epochs.at(window.epoch).drawn
        with lent_generators():
            for m, slot in enumerate(window.slots[i].tolist()):
                if slot >= 0:
                    crop, seed = images[slot], crop_seed(self._draw_seed, key_hash, drawn + m)
                    given = transformed(transform, crop, seed, lambda: self._describe(int(labelled.rows[i])))
                    # A transform that works in place returns its argument, which is the batch's own memory.
                    if given is not crop:
                        crop.copy_(given)

    def read(self, row: int, record: np.void) -> bytes:
        """Read an image's encoded bytes. Raises ImageError when it is missing, or is not the one that was labelled."""
        with self.clock.read:
            data = self.images.read(row, record)
            verify = self.settings.verify_images
            # Before decoding, so that bytes which are not those labelled reach no decoder.
            if verify == "always" or (verify == "first_epoch" and row not in self._checked):
                if image_digest(data) != record["image_digest"].tobytes():
                    raise ImageError("other_image", "its bytes are not those that were labelled (digest differs)")
                self._checked.add(row)
            return data

    def _describe(self, row: int) -> str:
        labels = self.labels
        shard, in_shard = labels.position(row)
        try:
            key = labels.keys_of(shard)[in_shard]
        # Keys may be unreadable. This text is for another error, which must not be replaced by that one.
        except FerkdError:
            key = f"row {in_shard}"
        return f"image {key!r} (shard {shard} of {labels.location})"

    def _mix(self, window: Window, images: Tensor, targets: list[SoftTargets]) -> None:
        selfmix = self.settings.selfmix
        if selfmix is None:
            return
        start = 0
        for i, (size, cursor) in enumerate(zip(window.batches, window.cursors, strict=True)):
            # Seeded by the batch's first position, so that ranks mix differently and a resume mixes the same.
            first = int(window.positions[0])
            generator = rng.generator("selfmix", self._draw_seed, cursor.epoch, first, i)
            _, targets[i] = selfmix(
                images[start : start + size],
                targets[i],
                crops_per_image=self.epochs.at(window.epoch).shape.crops_per_image,
                rng=generator,
                inplace=True,
            )
            start += size
