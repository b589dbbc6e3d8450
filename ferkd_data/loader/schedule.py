"""The schedule: which crops go into which batch of which rank. Pure functions of the settings and a `Cursor`.

The unit of work is a window: `spread` consecutive batches of a rank, made together by one worker from images that are
decoded once. Without spreading a window is one batch, and an image's M crops lie side by side in it. With spreading
they go to M different batches of the window.

Legend: M crops per image, B crops of a batch, P batches of a window, W ranks, b = B / M images per batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ferkd_data import rng

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class EpochShape:
    """The settings that shape an epoch."""

    num_images: int
    crops_per_image: int
    batch_size: int
    spread: int
    """P: 1 for none."""
    drop_last: bool
    seed: int

    @property
    def batch_images(self) -> int:
        return self.batch_size // self.crops_per_image


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A point of an epoch between two batches, for all ranks together. A saved state holds it as `place`."""

    epoch: int = 0
    images: int = 0
    """Images in the windows that are finished."""
    crops: int = 0
    """Crops consumed, by all ranks, of the window in work."""
    window_batches: int = 0
    """P of the window in work; 0 where none is."""
    window_ranks: int = 0
    """W it was begun with."""


class Position:
    """Where a training is: after the last batch given, and where its user wants to go on."""

    def __init__(self) -> None:
        self.cursor = Cursor()
        """After the last batch given, or the start that `set_epoch` or `resume` set."""
        self._requested: int | None = None
        """The epoch of a call to `set_epoch` that no iteration has begun with yet."""
        self._resumes = False
        """A state was loaded and no batch has been given since: the next iteration continues its epoch."""

    @property
    def is_requested(self) -> bool:
        """Whether `set_epoch` has asked for an epoch that no iteration has begun with yet."""
        return self._requested is not None

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration begin at the start of this epoch, unless a state of it was just loaded."""
        if not (self._resumes and epoch == self.cursor.epoch):
            self.cursor, self._requested, self._resumes = Cursor(epoch=epoch), epoch, False

    def resume(self, cursor: Cursor) -> None:
        """Let the next iteration go on here."""
        self.cursor, self._requested, self._resumes = cursor, None, True

    def start(self) -> Cursor:
        """Return the cursor at which an iteration that begins now begins."""
        if self._requested is not None:
            return Cursor(epoch=self._requested)
        # After an epoch's last batch the cursor is the start of the next one (`settled`): any other lies within an
        # epoch.
        if self._resumes or self.cursor == Cursor(epoch=self.cursor.epoch):
            return self.cursor
        return Cursor(epoch=self.cursor.epoch + 1)

    def begin(self, start: Cursor) -> None:
        """An iteration has begun at `start`."""
        self.cursor, self._requested = start, None

    def advance(self, cursor: Cursor) -> None:
        """A batch was given, after which the training is at `cursor`."""
        self.cursor, self._resumes = cursor, False


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Batches of a rank that one process makes together, from images that it decodes once."""

    epoch: int
    positions: Ints
    """(I,) images, by their position in the epoch."""
    slots: Ints
    """(I, M): where crop m of image i goes among the window's crops; -1 where it is not wanted."""
    batches: tuple[int, ...]
    """Crops in each batch of the window that is still to come."""
    cursors: tuple[Cursor, ...]
    """The cursor after each of these batches: where a resume goes on."""


def windows(shape: EpochShape, cursor: Cursor, *, rank: int, world_size: int) -> Iterator[Window]:
    """Yield the rest of an epoch for one rank, from `cursor` on. All ranks get the same number of batches."""
    # After a resume within a window: its rest first, with the P and W that it was begun with.
    if cursor.crops:
        yield from _rest_of_window(shape, cursor, rank, world_size)
        cursor = Cursor(epoch=cursor.epoch, images=cursor.images + window_images(shape, cursor))
    step_images = world_size * shape.batch_images
    while (steps := (shape.num_images - cursor.images) // step_images) > 0:
        # The last window has as many batches as are left, so that spreading costs an epoch no batch.
        begun = replace(cursor, window_batches=min(shape.spread, steps), window_ranks=world_size)
        yield _window(shape, begun, 0, rank)
        cursor = replace(cursor, images=cursor.images + begun.window_batches * step_images)
    left = shape.num_images - cursor.images
    if left and not shape.drop_last:
        yield _last_window(shape, cursor, left, rank, world_size)


def count_batches(shape: EpochShape, cursor: Cursor, *, world_size: int) -> int:
    """Count the batches that `windows` yields, without making them."""
    total = 0
    if cursor.crops:
        left = window_images(shape, cursor) * shape.crops_per_image - cursor.crops
        # Rounded up: where W has changed, the last batch of the window's rest is short (`_rest_of_window`).
        total += -(-left // (world_size * shape.batch_size))
        cursor = Cursor(epoch=cursor.epoch, images=cursor.images + window_images(shape, cursor))
    step_images = world_size * shape.batch_images
    steps, rest = divmod(shape.num_images - cursor.images, step_images)
    return total + steps + (1 if rest and not shape.drop_last else 0)


def settled(shape: EpochShape, cursor: Cursor, *, world_size: int) -> Cursor:
    """Return the cursor, or the start of the next epoch where no batch of this one is left.

    So the cursor after an epoch's last batch is the start of the next epoch, whether or not the loop asks for more.
    """
    if count_batches(shape, cursor, world_size=world_size):
        return cursor
    return Cursor(epoch=cursor.epoch + 1)


def stand_in(position: int, attempt: int, step: int, *, num_images: int) -> int:
    """Return the position of the image that replaces one that cannot be used; another one at each attempt.

    It is the corresponding image of a later window, `step` being the images of a rank's window: near in a streamed
    order, the same after a resume, and a different image for each position of a window. Attempts 0 to num_images - 1
    reach every position of the epoch once, attempt 0 the position itself.
    """
    # Steps return to their start after n / gcd(step, n) attempts. One position further they run through new images.
    lap = num_images // math.gcd(step, num_images)
    return (position + attempt * step + attempt // lap) % num_images


def window_images(shape: EpochShape, cursor: Cursor) -> int:
    """Return the images of the window in work, of all ranks that it was begun with."""
    return cursor.window_batches * cursor.window_ranks * shape.batch_images


def _batch_of_crop(shape: EpochShape, cursor: Cursor) -> Ints:
    """Return (P * b, M): the batch, within its window, that crop m of a rank's image i goes into.

    Image i begins at batch i % P, and its crops lie at the same distances from there: M distinct batches where P >= M,
    and B crops in every batch.
    """
    batches = cursor.window_batches
    # `images` differs between the windows of an epoch, so each window spreads by distances of its own.
    key = rng.hash64("spread", shape.seed, cursor.epoch, cursor.images)
    # A random permutation, as the order of random numbers: its first M entries are M different distances.
    distance = np.argsort(rng.counter64(key, np.arange(max(batches, shape.crops_per_image))), kind="stable")
    distance = (
        # P < M without spreading (P = 1) and in an epoch's last window: there, an image has several crops in a batch.
        distance[: shape.crops_per_image] if batches >= shape.crops_per_image else np.arange(shape.crops_per_image)
    )
    image = np.arange(batches * shape.batch_images)[:, None]
    # The P * b images reach each batch b times at each of the M distances: b * M = B crops in every batch.
    return np.asarray((image + distance[None]) % batches, np.int64)


def _slots(shape: EpochShape, cursor: Cursor) -> Ints:
    """Return (P * b, M): each crop's slot, 0 .. P * B - 1, in a rank's window, batch after batch."""
    batch = _batch_of_crop(shape, cursor)
    # Stable: an image's crops that go into the same batch stay side by side there, as SelfMix needs them.
    order = np.argsort(batch.reshape(-1), kind="stable")
    slots = np.empty(order.size, np.int64)
    slots[order] = np.arange(order.size)
    return slots.reshape(batch.shape)


def _window(shape: EpochShape, cursor: Cursor, done: int, rank: int) -> Window:
    """Return a rank's window from its batch number `done` on, for the number of ranks it was begun with."""
    size, step = shape.batch_size, cursor.window_ranks * shape.batch_size
    images = cursor.window_batches * shape.batch_images
    # Slots of batches that were given become negative, and their crops are not wanted any more.
    slots = _slots(shape, cursor) - done * size
    # A run of positions for each rank: in a streamed order, a host then reads as few shards as can be.
    positions = cursor.images + rank * images + np.arange(images)
    # An image whose crops were all given is not decoded again.
    wanted = (slots >= 0).any(axis=1)
    rest = range(done + 1, cursor.window_batches + 1)
    return Window(
        epoch=cursor.epoch,
        positions=positions[wanted],
        slots=np.maximum(slots[wanted], -1),
        batches=(size,) * len(rest),
        cursors=tuple(_after(shape, cursor, batch * step) for batch in rest),
    )


def _after(shape: EpochShape, cursor: Cursor, crops: int) -> Cursor:
    """Return the cursor after `crops` of the window in work."""
    total = window_images(shape, cursor)
    if crops >= total * shape.crops_per_image:
        return Cursor(epoch=cursor.epoch, images=cursor.images + total)
    return replace(cursor, crops=crops)


def _rest_of_window(shape: EpochShape, cursor: Cursor, rank: int, world_size: int) -> Iterator[Window]:
    done, odd = divmod(cursor.crops, cursor.window_ranks * shape.batch_size)
    if cursor.window_ranks == world_size and not odd:
        yield _window(shape, cursor, done, rank)
        return
    # Another number of ranks began the window: deal out what is left of it anew, in the order they would have had it.
    # All crops of all ranks, also those given: they are counted off from the front, in the order of the batches.
    images, crops = _window_crops(shape, cursor)
    step = world_size * shape.batch_size
    for start in range(cursor.crops, len(images), step):
        stop = min(start + step, len(images))
        # The same bounds on all ranks: r * n / W rounded down, so that shares differ by at most one crop.
        bounds = [start + (stop - start) * r // world_size for r in (rank, rank + 1)]
        mine = slice(bounds[0], bounds[1])
        yield _dealt(shape, cursor, images[mine], crops[mine], _after(shape, cursor, stop))


def _window_crops(shape: EpochShape, cursor: Cursor) -> tuple[Ints, Ints]:
    """Return positions and crop numbers m of all ranks' window, ordered by batch, then rank, then slot."""
    images = cursor.window_batches * shape.batch_images
    slots = _slots(shape, cursor).reshape(-1)
    rank = np.repeat(np.arange(cursor.window_ranks), slots.size)
    slot = np.tile(slots, cursor.window_ranks)
    order = np.lexsort((slot, rank, slot // shape.batch_size))
    image = np.repeat(np.arange(images), shape.crops_per_image)
    position = cursor.images + rank * images + np.tile(image, cursor.window_ranks)
    crop = np.tile(np.arange(shape.crops_per_image), images * cursor.window_ranks)
    return position[order], crop[order]


def _dealt(shape: EpochShape, cursor: Cursor, images: Ints, crops: Ints, after: Cursor) -> Window:
    # An image with several crops here is decoded once.
    positions, which = np.unique(images, return_inverse=True)
    slots = np.full((len(positions), shape.crops_per_image), -1, np.int64)
    slots[which, crops] = np.arange(len(images))
    return Window(epoch=cursor.epoch, positions=positions, slots=slots, batches=(len(images),), cursors=(after,))


def _last_window(shape: EpochShape, cursor: Cursor, left: int, rank: int, world_size: int) -> Window:
    """Return the epoch's last, short batch; images from its start fill up, so that all ranks get equally many."""
    # Equally many for every rank, since one that ran out of batches would leave the others waiting in all-reduce.
    images = -(-left // world_size)
    positions = (cursor.images + rank * images + np.arange(images)) % shape.num_images
    slots = np.arange(images * shape.crops_per_image).reshape(images, shape.crops_per_image)
    end = Cursor(epoch=cursor.epoch, images=shape.num_images)
    return Window(epoch=cursor.epoch, positions=positions, slots=slots, batches=(slots.size,), cursors=(end,))
