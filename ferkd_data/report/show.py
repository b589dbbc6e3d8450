"""Draw one image with its crops, for a notebook or as a PNG file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ferkd_data.crop_kinds import kind_starts
from ferkd_data.errors import UsageError
from ferkd_data.images import ImageSource
from ferkd_data.label_set import LabelSet
from ferkd_data.labels.buckets import BUCKETS
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.report.cards import box_text, ranked
from ferkd_data.report.pictures import cut, image_of
from ferkd_data.report.tables import short_names
from ferkd_data.storage import local_path, write_atomically

IMAGE_SIDE, CROP_SIDE = 480, 132
GAP, LINE = 14, 15
LABELS_SHOWN = 3
BOXES_DRAWN = 40
INK, QUIET, PAPER, GOOD, BAD = "#1b1f24", "#5a636e", "#ffffff", "#00734c", "#b3261e"
BUCKET_COLOURS = ("#c65100", "#e69f00", "#6cc4f5", "#00508f")
"""Colours by bucket code, also for people who cannot tell red from green; the report's style sheet has the same."""


class Shown:
    """A picture, returned by `show`. A notebook displays it by itself; `save` writes it; `repr` says it in words.

    >>> shown = fd.show(fd.open_labels("labels-with-images"))
    >>> shown.save("image.png")
    >>> shown.picture.mode
    'RGB'
    """

    def __init__(self, picture: Image.Image, text: str) -> None:
        self.picture = picture
        self.text = text
        """The content in words, for readers who cannot see the picture."""

    def save(self, path: str | Path) -> None:
        """Write a PNG file, under another name, and rename it."""
        with write_atomically(local_path(path)) as aside:
            self.picture.save(aside, "PNG")

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.picture.save(stream, "PNG")
        return stream.getvalue()

    def __repr__(self) -> str:
        return self.text


def show(
    labels: LabelSet,
    key: str | int = 0,
    *,
    images: str | Path | ImageSource | None = None,
    crops: int = 4,
    class_names: Sequence[str] | None = None,
) -> Shown:
    """Draw an image with its boxes coloured by bucket, and its least and most confident crops with their labels.

    Where there are crop kinds, each has rows of its own. `key` is an image's key or its row number. `images` is the
    SOURCE that was labelled; a label set of layout webdataset does without. `crops` is the number of least confident
    and of most confident crops. `class_names` name the classes of a label set without names.

    Raises KeyError for an unknown key, UsageError without images and for `crops` below 1, ImageError where the image is
    not the one that was labelled.

    >>> labels = fd.open_labels("labels-with-images")
    >>> fd.show(labels, next(labels.keys()), crops=2).save("image.png")
    """
    if crops < 1:
        raise UsageError(f"crops must be 1 or more, got {crops}")
    name = key if isinstance(key, str) else labels[key].key
    image = labels[name]
    pixels = image_of(labels, name, images)
    names = class_names or labels.class_names
    rows = _rows(labels, image, crops)
    return Shown(_drawn(image, pixels, rows, names), _in_words(image, rows, names))


def _rows(labels: LabelSet, image: ImageLabels, crops: int) -> list[tuple[str, list[int]]]:
    """Choose the crops to draw, in titled rows: the least and the most confident ones, of each crop kind."""
    order, kinds = ranked(image), labels.crop_kinds
    if not kinds:
        return [("least confident", order[:crops]), ("most confident", order[::-1][:crops])]
    rows = []
    for kind, start in zip(kinds, kind_starts(kinds), strict=True):
        mine = [number for number in order if start <= number < start + kind.crops]
        rows += [
            (f"{kind.name} ({kind.size} px), least confident", mine[:crops]),
            (f"{kind.name} ({kind.size} px), most confident", mine[::-1][:crops]),
        ]
    return rows


def _drawn(
    image: ImageLabels,
    pixels: npt.NDArray[np.uint8],
    rows: list[tuple[str, list[int]]],
    names: Sequence[str] | None,
) -> Image.Image:
    photo = boxes_on(image, pixels)
    columns = max(len(numbers) for _, numbers in rows)
    row_height = CROP_SIDE + (LABELS_SHOWN + 2) * LINE + GAP
    width = 3 * GAP + photo.width + columns * (CROP_SIDE + GAP)
    height = 3 * LINE + GAP + max(photo.height + 3 * LINE, len(rows) * row_height)
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    truth = "unlabelled" if image.target < 0 else f"truth: {_name(names, image.target)}"
    _write(draw, (GAP, GAP), f"{image.key}  ({image.width}x{image.height}, {truth})", INK, 15)
    top = GAP + 2 * LINE
    picture.paste(photo, (GAP, top))
    _legend(draw, GAP, top + photo.height + 6)
    left = 2 * GAP + photo.width
    for title, numbers in rows:
        _write(draw, (left, top - 2), title, QUIET)
        for column, number in enumerate(numbers):
            corner = (left + column * (CROP_SIDE + GAP), top + LINE)
            _crop(picture, draw, corner, (image, pixels, number), names)
        top += row_height
    return picture


def boxes_on(image: ImageLabels, pixels: npt.NDArray[np.uint8], numbers: Sequence[int] | None = None) -> Image.Image:
    """Draw the image with a longer side of IMAGE_SIDE and up to BOXES_DRAWN boxes, the most confident one on top."""
    # Also upwards, so that boxes on a thumbnail of 64 pixels can be seen.
    scale = IMAGE_SIDE / max(image.width, image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    photo = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(photo)
    order = ranked(image)
    step = -(-len(order) // BOXES_DRAWN)
    # In rising order of confidence: later boxes are drawn over earlier ones.
    for number in sorted({*order[::step], order[0], order[-1]}, key=order.index) if numbers is None else numbers:
        top, left, height, width = (float(side) * scale for side in image.boxes[number].tolist())
        # Pillow's rectangles include their last pixel.
        box = (left, top, max(left, left + width - 1), max(top, top + height - 1))
        wide = 4 if number in (order[0], order[-1]) else 2
        draw.rectangle(box, outline=BUCKET_COLOURS[image.bucket[number]], width=wide)
        # A dark outline, so that every colour stands out from every photo.
        draw.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline="#000000")
    return photo


def _crop(
    picture: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    crop: tuple[ImageLabels, npt.NDArray[np.uint8], int],
    names: Sequence[str] | None,
) -> None:
    image, pixels, number = crop
    x, y = corner
    picture.paste(Image.fromarray(cut(pixels, image, number, CROP_SIDE)), corner)
    frame = (x - 2, y - 2, x + CROP_SIDE + 1, y + CROP_SIDE + 1)
    draw.rectangle(frame, outline=BUCKET_COLOURS[image.bucket[number]], width=3)
    y += CROP_SIDE + 3
    for index, prob in list(zip(image.class_index[number], image.class_prob[number], strict=True))[:LABELS_SHOWN]:
        colour = INK if image.target < 0 else GOOD if index == image.target else BAD
        probability = f"{float(prob):.2f} "
        _write(draw, (x, y), probability + _fitted(draw, _name(names, int(index)), CROP_SIDE - 30), colour)
        y += LINE
    _write(draw, (x, y), f"crop {number}", QUIET)


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    for name, colour in zip(BUCKETS, BUCKET_COLOURS, strict=True):
        draw.rectangle((x, y + 2, x + 10, y + 12), fill=colour)
        _write(draw, (x + 15, y), name.replace("_", " "), QUIET)
        x += 112


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, colour: str, size: int = 12) -> None:
    # Pillow would draw a line break.
    draw.text(corner, " ".join(text.split()), fill=colour, font=ImageFont.load_default(size))


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    font = ImageFont.load_default(12)
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def _name(names: Sequence[str] | None, number: int) -> str:
    # ImageNet's names are lists of synonyms.
    return short_names(tuple(names))[number] if names and number < len(names) else f"class {number}"


def _in_words(image: ImageLabels, rows: list[tuple[str, list[int]]], names: Sequence[str] | None) -> str:
    truth = "unlabelled" if image.target < 0 else _name(names, image.target)
    lines = [f"{image.key} ({image.width}x{image.height}, {truth})"]
    for title, numbers in rows:
        lines.append(f"{title}:")
        for number in numbers:
            top = zip(image.class_index[number].tolist(), image.class_prob[number].tolist(), strict=True)
            labels = ", ".join(f"{_name(names, index)} {prob:.2f}" for index, prob in list(top)[:LABELS_SHOWN])
            lines.append(f"  crop {number}, {box_text(image, number)}: {labels}")
    return "\n".join(lines)
