"""Take pictures of the sampled images and crops, as JPEG data URIs inside the page.

Each image is read once, and one is decoded at a time. An image whose digest is not that of the labelled one is left
out, since its boxes would be wrong.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ferkd_data.errors import FerkdError, ImageError, UsageError
from ferkd_data.format import webdataset
from ferkd_data.images import ImageRef, ImageSource, open_source
from ferkd_data.label_set import LabelSet
from ferkd_data.label_set.joined_images import decode_checked
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.replay import replay
from ferkd_data.report.samples import Crop, SampledImage
from ferkd_data.storage import image_digest

CROP_PIXELS = 112
IMAGE_PIXELS = 400
"""Longer side of a whole image."""
THUMB_PIXELS = 160
QUALITY = 80


@dataclass(kw_only=True)
class Pictures:
    """Pictures of a page as data URIs, by key (and crop number); a missing one is simply absent."""

    images: dict[str, str]
    thumbs: dict[str, str]
    crops: dict[tuple[str, int], str]
    problem: str = ""
    """Reason why pictures are missing; "" where none is."""


def no_pictures() -> Pictures:
    """Make an empty collection."""
    return Pictures(images={}, thumbs={}, crops={})


def take_pictures(
    labels: LabelSet,
    source: str | Path | ImageSource | None,
    *,
    images: Iterable[SampledImage],
    thumbs: Iterable[SampledImage],
    crops: Iterable[Crop],
) -> Pictures:
    """Read the sampled images and cut their crops.

    Without a source, a label set of layout webdataset gives its own images, and others have no pictures. Raises
    SourceError where the source cannot be listed, and UsageError where it has none of the keys.
    """
    images, thumbs, crops = list(images), list(thumbs), list(crops)
    wanted = {image.key: image for image in (*images, *thumbs, *(crop.image for crop in crops))}
    taken = no_pictures()
    if source is None and labels.manifest.layout != "webdataset":
        return taken
    # An image may be needed whole, small, and for several crops: it is read and decoded once for all of them.
    whole, small = {image.key for image in images}, {image.key for image in thumbs}
    numbers: dict[str, list[int]] = {}
    for crop in crops:
        numbers.setdefault(crop.image.key, []).append(crop.number)
    found, problems = 0, []
    fetched = own_images(labels, wanted.values()) if source is None else source_images(source, wanted)
    for key, data in fetched:
        found += 1
        image = wanted[key]
        try:
            pixels = checked_pixels(image, data, labels.manifest.pixel_limit)
        except ImageError as error:
            problems.append(f"{key}: {error.detail}")
            continue
        if key in whole:
            taken.images[key] = data_uri(shrunk(pixels, IMAGE_PIXELS))
        if key in small:
            taken.thumbs[key] = data_uri(shrunk(pixels, THUMB_PIXELS))
        for number in numbers.get(key, ()):
            taken.crops[key, number] = data_uri(cut(pixels, image, number, CROP_PIXELS))
    taken.problem = _problem(labels, wanted, found, problems)
    return taken


def _problem(labels: LabelSet, wanted: dict[str, SampledImage], found: int, problems: list[str]) -> str:
    if wanted and not found:
        raise UsageError(
            f"{labels.location}: the images given have none of the keys sampled, such as "
            f"{next(iter(wanted))!r}; is it the same data set, with the same folder as its root?"
        )
    missing = len(wanted) - found
    remarks = [f"{missing} of {len(wanted)} sampled images are not among the images given"] if missing else []
    if problems:
        remarks.append(f"{len(problems)} could not be shown ({problems[0]})")
    return "; ".join(remarks)


def source_images(source: str | Path | ImageSource, wanted: Iterable[str]) -> Iterator[tuple[str, bytes | ImageError]]:
    """Yield (key, encoded bytes) of the wanted keys that a source has, in the order of its listing."""
    opened = open_source(source) if isinstance(source, (str, Path)) else source
    left = set(wanted)
    for ref in opened.list_images():
        if isinstance(ref, ImageRef) and ref.key in left:
            # A source that lists a key twice is asked for its first image, as a build labels that one.
            left.discard(ref.key)
            try:
                yield ref.key, opened.read_one(ref)
            except ImageError as error:
                yield ref.key, error
            # The listing may be of millions: it ends with the last sample.
            if not left:
                return


def own_images(labels: LabelSet, wanted: Iterable[SampledImage]) -> Iterator[tuple[str, bytes | ImageError]]:
    """Yield (key, encoded bytes) from the tars of a label set of layout webdataset; each tar is read once."""
    by_shard: dict[int, dict[str, SampledImage]] = {}
    for image in wanted:
        by_shard.setdefault(labels.position(image.row)[0], {})[image.key] = image
    for shard, images in sorted(by_shard.items()):
        with labels.open(labels.manifest.shards[shard].files[0]) as file:
            for row, data in webdataset.read_rows(file.path):
                if row.key in images:
                    yield row.key, data


def checked_pixels(image: ImageLabels, data: bytes | ImageError, pixel_limit: int) -> npt.NDArray[np.uint8]:
    """Decode a labelled image to (H, W, 3) uint8.

    Raises ImageError where it is not the image that was labelled, is larger than `pixel_limit`, or cannot be read.
    """
    if isinstance(data, ImageError):
        raise data
    # Zeros stand for an image that was not hashed.
    if any(image.image_digest) and image_digest(data) != image.image_digest:
        raise ImageError("other_image", "is another image than the one that was labelled")
    return decode_checked(data, (image.height, image.width), pixel_limit)


def cut(pixels: npt.NDArray[np.uint8], image: ImageLabels, number: int, size: int) -> npt.NDArray[np.uint8]:
    """Cut crop `number` as a student gets it: (size, size, 3) uint8."""
    return np.ascontiguousarray(replay(pixels, image.crops[number : number + 1], size=size)[0].permute(1, 2, 0).numpy())


def shrunk(pixels: npt.NDArray[np.uint8], longer_side: int) -> npt.NDArray[np.uint8]:
    """Reduce an image so that its longer side is at most `longer_side`; a smaller one is unchanged."""
    picture = Image.fromarray(pixels)
    # `reducing_gap` first reduces by a whole number, which is faster and cannot be seen at 3.
    picture.thumbnail((longer_side, longer_side), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(picture)


def data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Encode pixels (H, W, 3) as a JPEG data URI."""
    stream = io.BytesIO()
    # optimize: smaller tables, for a file that holds hundreds of pictures.
    Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def image_of(labels: LabelSet, key: str, source: str | Path | ImageSource | None) -> npt.NDArray[np.uint8]:
    """Read and decode one labelled image. Raises UsageError without images, ImageError, KeyError for an unknown key."""
    shard, row = labels.locate(key)
    image = labels[key]
    if source is None:
        if labels.manifest.layout != "webdataset":
            raise UsageError(f"{labels.location}: a label set of layout parquet holds no images; give images=…")
        sample = SampledImage(**vars(image), row=int(labels.first_row[shard]) + row)
        found = own_images(labels, [sample])
    else:
        found = source_images(source, [key])
    for _, data in found:
        return checked_pixels(image, data, labels.manifest.pixel_limit)
    raise FerkdError(f"{key!r}: no image has this key in the images given")
