"""Crops and images as cards of a page: their picture, their labels and their ground truth."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ferkd_data.buckets import BUCKETS
from ferkd_data.label_set import LabelSet
from ferkd_data.report.charts import boxes_picture, percent
from ferkd_data.report.collect import Collected
from ferkd_data.report.figures import BUCKET_TITLES
from ferkd_data.report.pictures import Pictures
from ferkd_data.report.samples import Crop, SampledImage
from ferkd_data.report.sliders import class_name
from ferkd_data.report.suspects import CSV_COLUMNS, Suspect, csv_rows

BOXES_DRAWN = 40
"""On a sampled image: more would hide it."""
EXTREMES = 3
"""Crops of an image, the least and the most confident, that are shown with their labels."""


def crop_view(labels: LabelSet, crop: Crop, pictures: Pictures) -> dict[str, Any]:
    """A crop as a card: its picture, its labels, its ground truth."""
    image, number = crop.image, crop.number
    top = zip(image.class_index[number].tolist(), image.class_prob[number].astype(float).tolist(), strict=True)
    said = float(image.target_prob[number])
    return {
        "key": image.key,
        "number": number,
        "picture": pictures.crops.get((image.key, number), ""),
        "bucket": int(image.bucket[number]),
        "bucket_name": BUCKET_TITLES[BUCKETS[image.bucket[number]]],
        "p_max": f"{crop.p_max:.2f}",
        "labels": [(class_name(labels, index), f"{prob:.2f}", prob) for index, prob in list(top)[:5]],
        "truth": class_name(labels, image.target),
        "truth_prob": "" if np.isnan(said) else f"{said:.2f}",
        "right": image.target < 0 or crop.top1 == image.target,
        "box": box_text(image, number),
    }


def box_text(image: Any, number: int) -> str:
    """`104x88 at 12, 30`: width and height of a crop, and its place from the left and the top, in pixels."""
    top, left, height, width = image.boxes[number].tolist()
    return f"{width}x{height} at {left}, {top}{', flipped' if image.flip[number] else ''}"


def image_view(labels: LabelSet, image: SampledImage, pictures: Pictures) -> dict[str, Any]:
    """An image with its boxes, and its least and most confident crops."""
    return {
        "key": image.key,
        "truth": class_name(labels, image.target),
        "svg": drawn_boxes(image, pictures.images.get(image.key, "")),
        "least": [crop_view(labels, Crop(image=image, number=n), pictures) for n in ranked(image)[:EXTREMES]],
        "most": [crop_view(labels, Crop(image=image, number=n), pictures) for n in ranked(image)[::-1][:EXTREMES]],
    }


def ranked(image: Any) -> list[int]:
    """Crop numbers, the least confident first."""
    order: list[int] = np.argsort(image.class_prob[:, 0], kind="stable").tolist()
    return order


def extremes(image: SampledImage) -> list[Crop]:
    """The crops of `image_view` that have pictures."""
    order = ranked(image)
    numbers = dict.fromkeys([*order[:EXTREMES], *order[::-1][:EXTREMES]])
    return [Crop(image=image, number=number) for number in numbers]


def drawn_boxes(image: Any, picture: str) -> Markup:
    """The image with up to BOXES_DRAWN boxes, evenly over their ranks, the least and the most confident labelled."""
    order = ranked(image)
    step = max(1, -(-len(order) // BOXES_DRAWN))
    drawn = sorted({*order[::step], order[0], order[-1]})
    boxes = []
    for n in drawn:
        label = f"{float(image.class_prob[n, 0]):.2f}" if n in (order[0], order[-1]) else ""
        boxes.append((image.boxes[n].tolist(), int(image.bucket[n]), label))
    title = f"{image.key}: {len(drawn)} of {len(order)} crops, coloured by bucket"
    return boxes_picture(picture, (image.height, image.width), boxes, title)


def sheets(labels: LabelSet, found: Collected, pictures: Pictures) -> list[dict[str, Any]]:
    """Sampled crops by bucket, then those that are confident but wrong."""
    thresholds = labels.manifest.thresholds
    bounds = (
        f"below {thresholds.low:g}: usually background; discarded by ferkd, that is, not drawn in training",
        f"{thresholds.low:g} to {thresholds.mid:g}: context; gets the softened ground truth under ferkd",
        f"{thresholds.mid:g} to {thresholds.top:g}: a part of the object; keeps its soft label",
        f"from {thresholds.top:g}: keeps its soft label, or is thinned out, since it teaches little",
    )
    views = []
    for code, name in enumerate(BUCKETS):
        share = found.sketch.buckets[0, code] / max(found.sketch.crops, 1)
        views.append(
            {
                "name": BUCKET_TITLES[name],
                "code": code,
                "about": bounds[code],
                "share": percent(float(share)),
                "crops": [crop_view(labels, crop, pictures) for crop in found.sheets[code]],
            }
        )
    _, known, right = found.sketch.buckets[:, 2:].sum(axis=1).tolist()
    views.append(
        {
            "name": "confident but wrong",
            "code": "wrong",
            "about": "crops of the two positive buckets whose most probable class is not the ground truth: often the "
            "ground truth is wrong, or the image shows several things",
            "share": percent((known - right) / max(found.sketch.crops, 1)),
            "crops": [crop_view(labels, crop, pictures) for crop in found.wrong],
        }
    )
    return views


def suspect_view(labels: LabelSet, suspect: Suspect, pictures: Pictures) -> dict[str, Any]:
    """A card of an image whose ground truth is doubtful."""
    return {
        "key": suspect.image.key,
        "picture": pictures.thumbs.get(suspect.image.key, ""),
        "truth": class_name(labels, suspect.image.target),
        "suggested": class_name(labels, suspect.suggested),
        "crops": suspect.crops,
        "of": len(suspect.image.bucket),
        "p_max": f"{suspect.mean_p_max:.2f}",
        "truth_prob": f"{suspect.mean_target_prob:.3f}",
    }


def suspects_csv(suspects: Sequence[Suspect], labels: LabelSet) -> str:
    """The list as a data URI that a browser saves."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(CSV_COLUMNS)
    writer.writerows(csv_rows(suspects, labels.class_names))
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(stream.getvalue().encode()).decode()


def thumb_view(labels: LabelSet, image: SampledImage, pictures: Pictures) -> dict[str, Any]:
    """A small picture of an image with its size and class."""
    return {
        "key": image.key,
        "picture": pictures.thumbs.get(image.key, ""),
        "size": f"{image.width}x{image.height}",
        "truth": class_name(labels, image.target),
    }
