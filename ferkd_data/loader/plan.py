"""Which crops go into which batch of which rank: pure functions of the settings and a place in the epoch.

The unit of work is a window: `spread` consecutive batches of a rank, made together by one worker from images that are
decoded once. Without spreading a window is one batch, and an image's M crops lie side by side in it. With spreading
they go to M different batches of the window.

Legend: M crops per image, B crops of a batch, P batches of a window, W ranks, b = B / M images per batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.errors import StateMismatchError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Layout:
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
class Place:
    """A place in an epoch, between two batches, for all ranks together."""

    epoch: int = 0
    images: int = 0
    """Images in the windows that are finished."""
    crops: int = 0
    """Crops consumed, by all ranks, of the window in work."""
    window_batches: int = 0
    """P of the window in work; 0 where none is."""
    window_ranks: int = 0
    """W it was begun with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """What one worker makes at once."""

    epoch: int
    positions: Ints
    """(I,) images, by their position in the epoch."""
    slots: Ints
    """(I, M): where crop m of image i goes among the window's crops; -1 where it is not wanted."""
    batches: tuple[int, ...]
    """Crops in each batch of the window that is still to come."""
    places: tuple[Place, ...]
    """The place after each of these batches."""


def read_place(saved: Any, layout: Layout) -> Place:
    """A place as `asdict` wrote it. Raises StateMismatchError for one that is malformed or in no epoch of `layout`."""
    names = [field.name for field in fields(Place)]
    if not isinstance(saved, dict) or set(saved) != set(names):
        raise StateMismatchError(f"this state is damaged: its place must hold {', '.join(names)}; it is {saved!r}")
    for name, value in saved.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
            raise StateMismatchError(f"this state is damaged: {name} of its place is {value!r}, not a number from 0 on")
    place = Place(**{name: int(value) for name, value in saved.items()})
    window = _window_images(layout, place)
    in_window = 0 < place.crops < window * layout.crops_per_image
    if place.images + window > layout.num_images or not (in_window or place.crops == window == 0):
        raise StateMismatchError(
            f"this state is damaged: its place is in no epoch of {layout.num_images} images with "
            f"{layout.crops_per_image} crops of each: {saved}"
        )
    return place


def saved_epoch(saved: Any) -> int:
    """The epoch of a place that was saved, which decides the layout that the place must fit; 0 for a damaged one."""
    epoch = saved.get("epoch") if isinstance(saved, dict) else None
    return max(int(epoch), 0) if isinstance(epoch, Integral) else 0


def windows(layout: Layout, place: Place, *, rank: int, world_size: int) -> Iterator[Window]:
    """The rest of an epoch, from `place` on, for one rank. All ranks get the same number of batches."""
    if place.crops:
        yield from _rest_of_window(layout, place, rank, world_size)
        place = Place(epoch=place.epoch, images=place.images + _window_images(layout, place))
    step_images = world_size * layout.batch_images
    while (steps := (layout.num_images - place.images) // step_images) > 0:
        begun = replace(place, window_batches=min(layout.spread, steps), window_ranks=world_size)
        yield _window(layout, begun, 0, rank)
        place = replace(place, images=place.images + begun.window_batches * step_images)
    left = layout.num_images - place.images
    if left and not layout.drop_last:
        yield _last_window(layout, place, left, rank, world_size)


def count_batches(layout: Layout, place: Place, *, world_size: int) -> int:
    """Batches that `windows` yields, without making them."""
    total = 0
    if place.crops:
        left = _window_images(layout, place) * layout.crops_per_image - place.crops
        total += -(-left // (world_size * layout.batch_size))
        place = Place(epoch=place.epoch, images=place.images + _window_images(layout, place))
    step_images = world_size * layout.batch_images
    steps, rest = divmod(layout.num_images - place.images, step_images)
    return total + steps + (1 if rest and not layout.drop_last else 0)


def settled(layout: Layout, place: Place, *, world_size: int) -> Place:
    """The place, or the start of the next epoch where no batch of this one is left.

    So the place after an epoch's last batch is the start of the next epoch, whether or not the loop asks for more.
    """
    if count_batches(layout, place, world_size=world_size):
        return place
    return Place(epoch=place.epoch + 1)


def stand_in(position: int, attempt: int, step: int, *, num_images: int) -> int:
    """The position of the image that takes the place of one that cannot be used, at each attempt another one.

    It is the image in the same place of a later window, `step` being the images of a rank's window: near in a streamed
    order, the same after a resume, and a different image for each place of a window. Attempts 0 to num_images - 1 reach
    every position of the epoch once, attempt 0 the position itself.
    """
    lap = num_images // math.gcd(step, num_images)
    return (position + attempt * step + attempt // lap) % num_images


def _window_images(layout: Layout, place: Place) -> int:
    return place.window_batches * place.window_ranks * layout.batch_images


def _batch_of_crop(layout: Layout, place: Place) -> Ints:
    """(P * b, M): into which batch of its window crop m of a rank's image i goes.

    Image i begins at batch i % P, and its crops lie at the same distances from there: M distinct batches where P >= M,
    and B crops in every batch.
    """
    batches = place.window_batches
    key = rng.hash64("spread", layout.seed, place.epoch, place.images)
    distance = np.argsort(rng.counter64(key, np.arange(max(batches, layout.crops_per_image))), kind="stable")
    distance = (
        distance[: layout.crops_per_image] if batches >= layout.crops_per_image else np.arange(layout.crops_per_image)
    )
    image = np.arange(batches * layout.batch_images)[:, None]
    return np.asarray((image + distance[None]) % batches, np.int64)


def _slots(layout: Layout, place: Place) -> Ints:
    """(P * b, M): each crop's place among the P * B crops of a rank's window, batch after batch."""
    batch = _batch_of_crop(layout, place)
    order = np.argsort(batch.reshape(-1), kind="stable")
    slots = np.empty(order.size, np.int64)
    slots[order] = np.arange(order.size)
    return slots.reshape(batch.shape)


def _window(layout: Layout, place: Place, done: int, rank: int) -> Window:
    """A rank's window from its batch number `done` on, for the number of ranks it was begun with."""
    size, step = layout.batch_size, place.window_ranks * layout.batch_size
    images = place.window_batches * layout.batch_images
    slots = _slots(layout, place) - done * size
    positions = place.images + rank * images + np.arange(images)
    wanted = (slots >= 0).any(axis=1)
    rest = range(done + 1, place.window_batches + 1)
    return Window(
        epoch=place.epoch,
        positions=positions[wanted],
        slots=np.maximum(slots[wanted], -1),
        batches=(size,) * len(rest),
        places=tuple(_after(layout, place, batch * step) for batch in rest),
    )


def _after(layout: Layout, place: Place, crops: int) -> Place:
    """The place when `crops` of the window in work are consumed."""
    total = _window_images(layout, place)
    if crops >= total * layout.crops_per_image:
        return Place(epoch=place.epoch, images=place.images + total)
    return replace(place, crops=crops)


def _rest_of_window(layout: Layout, place: Place, rank: int, world_size: int) -> Iterator[Window]:
    done, odd = divmod(place.crops, place.window_ranks * layout.batch_size)
    if place.window_ranks == world_size and not odd:
        yield _window(layout, place, done, rank)
        return
    # Begun by another number of ranks: what is left, in the order they would have had it, is dealt out anew.
    images, crops = _window_crops(layout, place)
    step = world_size * layout.batch_size
    for start in range(place.crops, len(images), step):
        stop = min(start + step, len(images))
        bounds = [start + (stop - start) * r // world_size for r in (rank, rank + 1)]
        mine = slice(bounds[0], bounds[1])
        yield _dealt(layout, place, images[mine], crops[mine], _after(layout, place, stop))


def _window_crops(layout: Layout, place: Place) -> tuple[Ints, Ints]:
    """Positions and crop numbers m of all ranks' window, ordered by batch, then rank, then slot."""
    images = place.window_batches * layout.batch_images
    slots = _slots(layout, place).reshape(-1)
    rank = np.repeat(np.arange(place.window_ranks), slots.size)
    slot = np.tile(slots, place.window_ranks)
    order = np.lexsort((slot, rank, slot // layout.batch_size))
    image = np.repeat(np.arange(images), layout.crops_per_image)
    position = place.images + rank * images + np.tile(image, place.window_ranks)
    crop = np.tile(np.arange(layout.crops_per_image), images * place.window_ranks)
    return position[order], crop[order]


def _dealt(layout: Layout, place: Place, images: Ints, crops: Ints, after: Place) -> Window:
    positions, which = np.unique(images, return_inverse=True)
    slots = np.full((len(positions), layout.crops_per_image), -1, np.int64)
    slots[which, crops] = np.arange(len(images))
    return Window(epoch=place.epoch, positions=positions, slots=slots, batches=(len(images),), places=(after,))


def _last_window(layout: Layout, place: Place, left: int, rank: int, world_size: int) -> Window:
    """One short batch for each rank; images from the epoch's start fill up where ranks would differ."""
    images = -(-left // world_size)
    positions = (place.images + rank * images + np.arange(images)) % layout.num_images
    if place.images == 0:
        positions %= left
    slots = np.arange(images * layout.crops_per_image).reshape(images, layout.crops_per_image)
    end = Place(epoch=place.epoch, images=layout.num_images)
    return Window(epoch=place.epoch, positions=positions, slots=slots, batches=(slots.size,), places=(end,))
