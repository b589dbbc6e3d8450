"""Bounded look-ahead: work done in threads while the consumer is busy, results in order.

Images to batches of crops: decoded once, cut once for each teacher input size, while the teacher is busy.

Legend: B crops of a batch, N crops per image, S output side.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.augment import draw_operations
from ferkd_data.builder.labelling.forwards import Staging
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.crops import Crops, draw_crops
from ferkd_data.errors import BuildError, ImageError
from ferkd_data.images import ImageRef, Reject, decode_rgb, while_it_answers
from ferkd_data.labels.rows import UNKNOWN_TARGET
from ferkd_data.replay import CUT_BYTES, Interpolation, empty_batch, replay, replay_on_device
from ferkd_data.storage import image_digest
from ferkd_data.teachers.teacher import is_out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def look_ahead(
    executor: Executor, function: Callable[[Item], Result], items: Iterable[Item], *, depth: int
) -> Iterator[Result]:
    """`map(function, items)` with at most `depth` results computed or under way beyond the one in use.

    An exception of `function` or of `items` is raised where its result is due; what is under way is then waited for.
    """
    under_way: deque[Future[Result]] = deque()
    source = iter(items)
    try:
        while True:
            while len(under_way) < depth:
                try:
                    item = next(source)
                except StopIteration:
                    break
                under_way.append(executor.submit(function, item))
            if not under_way:
                return
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def in_background(items: Iterable[Item], *, depth: int) -> Iterator[Item]:
    """The same items, taken out of their iterator in a thread of its own, up to `depth` before they are asked for."""
    source = iter(items)
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ferkd-data-read") as executor:
        for item in look_ahead(executor, lambda _: next(source, end), itertools.repeat(None), depth=depth):
            if item is end:
                return
            yield item  # type: ignore[misc]


BATCHES_AHEAD = 2
CUT_SHARES = (1, 8, 64)
"""Into how many parts the memory for cutting on a device is divided, where it runs out."""
READ_AHEAD = 16
"""Encoded images read before they are decoded: a source that answers late for a moment is not noticed."""


class View(NamedTuple):
    """One way of cutting: teachers that share it share the crops."""

    size: int
    interpolation: Interpolation


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedImage:
    ref: ImageRef
    data: bytes
    digest: bytes
    pixels: npt.NDArray[np.uint8]
    """(H, W, 3)"""
    crops: Crops

    @property
    def target(self) -> int:
        return UNKNOWN_TARGET if self.ref.target is None else self.ref.target


class Slice(NamedTuple):
    """Crops start .. stop - 1 of an image."""

    image: DecodedImage
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, eq=False)
class CropBatch:
    slices: Sequence[Slice]
    views: dict[View, Tensor]
    """uint8 (B, 3, S, S) for each view."""
    targets: npt.NDArray[np.int64]
    """(B,), -1 where unknown."""
    cut: Any = None
    """The moment when the views are ready on their device, for `Staging.join`."""


@dataclass(kw_only=True)
class Rejected:
    """Images of this shard that could not be used, in order."""

    items: list[Reject] = field(default_factory=list)


def crop_batches(
    refs: Sequence[ImageRef],
    contents: Iterable[bytes | ImageError],
    *,
    settings: BuildSettings,
    first_crop: int,
    views: Sequence[View],
    staging: Staging,
    batch_size: int,
    executor: Executor,
    workers: int,
    rejected: Rejected,
) -> Iterator[CropBatch]:
    """Batches of `batch_size` crops, in the order of `refs`; the last one may be short.

    The batches depend on `refs` and the settings alone, so a shard labelled again gives the same bytes.
    """

    def decode(item: tuple[ImageRef, bytes | ImageError]) -> DecodedImage | Reject:
        return _decode(*item, settings=settings, first_crop=first_crop)

    def cut(slices: Sequence[Slice]) -> CropBatch:
        return _cut(slices, views, staging)

    read = in_background(while_it_answers(contents), depth=READ_AHEAD)
    decoded = look_ahead(executor, decode, zip(refs, read, strict=True), depth=workers + 1)
    return look_ahead(executor, cut, _slices(_accepted(decoded, rejected), batch_size), depth=BATCHES_AHEAD)


def _decode(
    ref: ImageRef, data: bytes | ImageError, *, settings: BuildSettings, first_crop: int
) -> DecodedImage | Reject:
    try:
        if isinstance(data, ImageError):
            raise data
        pixels = decode_rgb(data, max_pixels=settings.max_pixels)
        height, width = pixels.shape[:2]
        crops = draw_crops(
            ref.key,
            height,
            width,
            seed=settings.seed,
            first=first_crop,
            count=settings.crops - first_crop,
            distribution=settings.distribution,
        )
        if settings.augmentations:
            crops = replace(crops, operations=_operations(ref.key, settings, first_crop))
    except ImageError as error:
        return Reject(key=ref.key, reason=error.reason, detail=error.detail)
    return DecodedImage(ref=ref, data=data, digest=image_digest(data), pixels=pixels, crops=crops)


def _operations(key: str, settings: BuildSettings, first_crop: int) -> npt.NDArray[np.uint16]:
    count = settings.crops - first_crop
    drawn = draw_operations(key, settings.augmentations, seed=settings.seed, first=first_crop, count=count)
    return drawn.pack()


def _accepted(decoded: Iterable[DecodedImage | Reject], rejected: Rejected) -> Iterator[DecodedImage]:
    for image in decoded:
        if isinstance(image, Reject):
            rejected.items.append(image)
        else:
            yield image


def _slices(images: Iterable[DecodedImage], batch_size: int) -> Iterator[list[Slice]]:
    batch: list[Slice] = []
    room = batch_size
    for image in images:
        start, total = 0, len(image.crops)
        while start < total:
            stop = min(total, start + room)
            batch.append(Slice(image, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], batch_size
    if batch:
        yield batch


def _cut(slices: Sequence[Slice], views: Sequence[View], staging: Staging) -> CropBatch:
    counts = [piece.stop - piece.start for piece in slices]
    targets = np.repeat([piece.image.target for piece in slices], counts).astype(np.int64)
    if not staging.on_device:
        return CropBatch(slices=slices, views={view: _cut_on_cpu(slices, view) for view in views}, targets=targets)
    with staging.cutting():
        crops = _cut_on_device(slices, views, staging)
        return CropBatch(slices=slices, views=crops, targets=targets, cut=staging.mark())


def _cut_on_cpu(slices: Sequence[Slice], view: View) -> Tensor:
    out = empty_batch(sum(piece.stop - piece.start for piece in slices), view.size)
    row = 0
    for piece in slices:
        rows = piece.stop - piece.start
        replay(
            piece.image.pixels,
            _part(piece),
            size=view.size,
            interpolation=view.interpolation,
            out=out[row : row + rows],
        )
        row += rows
    return out


def _cut_on_device(slices: Sequence[Slice], views: Sequence[View], staging: Staging) -> dict[View, Tensor]:
    """The crops of several images with few kernels; where the teachers leave too little memory, in smaller steps."""
    for share in CUT_SHARES:
        try:
            return _cut_within(CUT_BYTES // share, slices, views, staging)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if share == CUT_SHARES[-1]:
                raise BuildError(
                    "the device has too little memory to cut crops beside its teachers; end what else runs on it, or "
                    "use a smaller --batch-size or fewer --processes"
                ) from error
    raise AssertionError("the last share returns or raises")


@torch.inference_mode()
def _cut_within(budget: int, slices: Sequence[Slice], views: Sequence[View], staging: Staging) -> dict[View, Tensor]:
    """Every image, and all boxes together, are brought up once."""
    crops = [_part(piece) for piece in slices]
    boxes = staging.upload(np.concatenate([part.boxes for part in crops]).astype(np.int64))
    flip = staging.upload(np.concatenate([part.flip for part in crops]))
    pixels = [staging.upload(piece.image.pixels).permute(2, 0, 1) for piece in slices]
    return {view: replay_on_device(pixels, crops, boxes, flip, **view._asdict(), budget=budget) for view in views}


def _part(piece: Slice) -> Crops:
    return piece.image.crops[piece.start : piece.stop]
