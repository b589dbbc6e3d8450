"""Images to batches of crops: each image decoded once, each crop cut once for each input size of the teachers.

Decoding and cutting run in threads ahead of the teachers, a bounded number of results deep:

    reading thread -> encoded images -> decoding threads -> decoded images -> cutting threads -> batches -> teachers

Legend: B crops of a batch, N crops per image, S output side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.augment import draw_operations
from ferkd_data.augment.distribution import Augmentation
from ferkd_data.builder.labelling.forwards import Staging
from ferkd_data.builder.labelling.job import Tools
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.crops import Crops
from ferkd_data.errors import BuildError, ImageError, OutOfMemoryError
from ferkd_data.images import ImageRef, Reject, decode_rgb, while_it_answers
from ferkd_data.labels.rows import UNKNOWN_TARGET
from ferkd_data.replay import CUT_BYTES, Interpolation, empty_batch, replay, replay_on_device
from ferkd_data.storage import image_digest
from ferkd_data.teachers import Teacher
from ferkd_data.teachers.teacher import is_out_of_memory
from ferkd_data.threads import in_background, look_ahead

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCHES_AHEAD = 2
"""Batches that are cut while the teachers work on one. With one alone, they would wait for each that takes longer to
cut. 256 crops of 224 px take 38 MB."""
CUT_SHARES = (1, 8, 64)
"""Divisors of the memory for cutting on a device, tried in turn where memory runs out."""
READ_AHEAD = 16
"""Encoded images that are read before they are decoded: they bridge a source that answers late for a moment."""


class CropInput(NamedTuple):
    """The size and interpolation that a teacher's crops are cut with. Teachers that share it share the crops."""

    size: int
    interpolation: Interpolation


def input_of(teacher: Teacher) -> CropInput:
    return CropInput(teacher.preprocessing.size, teacher.preprocessing.interpolation)


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedImage:
    """An image's pixels, and the crops that are to be cut out of it."""

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

    @property
    def crops(self) -> Crops:
        return self.image.crops[self.start : self.stop]


@dataclass(frozen=True, kw_only=True, eq=False)
class CropBatch:
    """Crops of one or several images, cut for every input size of the teachers."""

    slices: Sequence[Slice]
    pixels: dict[CropInput, Tensor]
    """uint8 (B, 3, S, S) for each input."""
    targets: npt.NDArray[np.int64]
    """(B,), -1 where unknown."""
    cut: Any = None
    """The moment when `pixels` are ready on their device, for `Staging.join`."""


def crop_batches(refs: Sequence[ImageRef], tools: Tools, first_crop: int) -> Iterator[CropBatch | Reject]:
    """Yield crops `first_crop` .. N - 1 of each image in batches of the job's size; the last batch may be short.

    Batches come in the order of `refs`. The Reject of an image that cannot be used comes before the first batch that
    is completed after it. Batches depend on `refs` and the settings alone, so a shard labelled again gives the same
    bytes.
    """
    settings, resources = tools.job.settings, tools.job.resources
    augmentations = settings.augmentations  # parsed once, not for each image
    inputs = list(dict.fromkeys(map(input_of, tools.teachers)))

    def decode(item: tuple[ImageRef, bytes | ImageError]) -> DecodedImage | Reject:
        return _decode(*item, settings=settings, augmentations=augmentations, first_crop=first_crop)

    def cut(item: list[Slice] | Reject) -> CropBatch | Reject:
        return item if isinstance(item, Reject) else _cut(item, inputs, tools.staging)

    # One reading thread, since `read` goes through tars and row groups in order. `while_it_answers` runs in it.
    contents = in_background(while_it_answers(tools.source.read(refs)), depth=READ_AHEAD)
    encoded = zip(refs, contents, strict=True)
    # Both steps share the executor without risk of a deadlock: their inputs are consumed in the labelling thread, so no
    # task in the executor waits for another one. One image more than threads, so that none waits for the next to be
    # asked.
    decoded = look_ahead(tools.executor, decode, encoded, depth=resources.threads + 1)
    return look_ahead(tools.executor, cut, _slices(decoded, resources.batch_size), depth=BATCHES_AHEAD)


def _decode(
    ref: ImageRef,
    data: bytes | ImageError,
    *,
    settings: BuildSettings,
    augmentations: Sequence[Augmentation],
    first_crop: int,
) -> DecodedImage | Reject:
    try:
        if isinstance(data, ImageError):
            raise data
        pixels = decode_rgb(data, max_pixels=settings.max_pixels)
        height, width = pixels.shape[:2]
        crops = settings.draw(ref.key, height, width, first=first_crop)
        if augmentations:
            wanted = {"seed": settings.seed, "first": first_crop, "count": settings.crops - first_crop}
            crops = replace(crops, operations=draw_operations(ref.key, augmentations, **wanted).pack())
    except ImageError as error:
        return Reject(key=ref.key, reason=error.reason, detail=error.detail)
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"image {ref.key!r}: {error}, or reject such images (--max-pixels)") from error
    # The digest here, in a decoding thread, where it costs the labelling thread nothing.
    return DecodedImage(ref=ref, data=data, digest=image_digest(data), pixels=pixels, crops=crops)


def _slices(images: Iterable[DecodedImage | Reject], batch_size: int) -> Iterator[list[Slice] | Reject]:
    """Cut the crops of all images, one after the other, into batches; an image's crops may lie in several."""
    batch: list[Slice] = []
    room = batch_size
    for image in images:
        if isinstance(image, Reject):
            yield image
            continue
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


def _cut(slices: Sequence[Slice], inputs: Sequence[CropInput], staging: Staging) -> CropBatch:
    counts = [piece.stop - piece.start for piece in slices]
    targets = np.repeat([piece.image.target for piece in slices], counts).astype(np.int64)
    if not staging.on_device:
        pixels = {each: _cut_on_cpu(slices, each) for each in inputs}
        return CropBatch(slices=slices, pixels=pixels, targets=targets)
    with staging.cutting():
        pixels = _cut_on_device(slices, inputs, staging)
        return CropBatch(slices=slices, pixels=pixels, targets=targets, cut=staging.mark())


def _cut_on_cpu(slices: Sequence[Slice], crop_input: CropInput) -> Tensor:
    out = empty_batch(sum(piece.stop - piece.start for piece in slices), crop_input.size)
    row = 0
    for piece in slices:
        rows = slice(row, row + piece.stop - piece.start)
        replay(piece.image.pixels, piece.crops, **crop_input._asdict(), out=out[rows])
        row = rows.stop
    return out


def _cut_on_device(slices: Sequence[Slice], inputs: Sequence[CropInput], staging: Staging) -> dict[CropInput, Tensor]:
    """Cut the crops of several images with few kernels; in smaller steps where the teachers leave too little memory."""
    for share in CUT_SHARES:
        try:
            return _cut_within(CUT_BYTES // share, slices, inputs, staging)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if share == CUT_SHARES[-1]:
                raise BuildError(
                    "the device has too little memory to cut crops beside its teachers; end what else runs on it, or "
                    "use a smaller --batch-size or fewer --workers"
                ) from error
    raise AssertionError("the last share returns or raises")


@torch.inference_mode()
def _cut_within(
    budget: int, slices: Sequence[Slice], inputs: Sequence[CropInput], staging: Staging
) -> dict[CropInput, Tensor]:
    """Upload every image, and all boxes together, once."""
    crops = [piece.crops for piece in slices]
    boxes = staging.upload(np.concatenate([part.boxes for part in crops]).astype(np.int64))
    flip = staging.upload(np.concatenate([part.flip for part in crops]))
    pixels = [staging.upload(piece.image.pixels).permute(2, 0, 1) for piece in slices]
    return {each: replay_on_device(pixels, crops, boxes, flip, **each._asdict(), budget=budget) for each in inputs}
