"""Describe crops and images as cards of a page, and the data of its sliders, as plain numbers and texts."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ferkd_data.format.manifest import ThresholdsEntry
from ferkd_data.label_set import LabelSet
from ferkd_data.labels.buckets import BUCKETS, Thresholds
from ferkd_data.report.charts import boxes_picture
from ferkd_data.report.collect import Collected
from ferkd_data.report.pictures import Pictures
from ferkd_data.report.samples import Crop, SampledImage
from ferkd_data.report.sketch import CONFIDENCES, Sketch, counts_below
from ferkd_data.report.suspects import CSV_COLUMNS, Suspect, csv_rows
from ferkd_data.report.tables import BUCKET_TITLES, class_name
from ferkd_data.report.thresholds import Suggestion
from ferkd_data.words import percent

BOXES_DRAWN = 40
"""Most boxes drawn on an image; more would hide it."""
EXTREMES = 3
"""Number of least confident and of most confident crops of an image that are shown with their labels."""
SLIDER_STEPS = 1000
"""Thresholds go in steps of 1 / STEPS. JavaScript and Python divide alike, so both compare with the same number."""
BINS = 100
"""Bars of the histogram."""


def crop_card(labels: LabelSet, crop: Crop, pictures: Pictures) -> dict[str, Any]:
    """Describe a crop: its picture, labels and ground truth."""
    image, number = crop.image, crop.number
    top = zip(image.class_index[number].tolist(), image.class_prob[number].astype(float).tolist(), strict=True)
    truth_prob = float(image.target_prob[number])
    return {
        "key": image.key,
        "number": number,
        "picture": pictures.crops.get((image.key, number), ""),
        "bucket": int(image.bucket[number]),
        "bucket_name": BUCKET_TITLES[BUCKETS[image.bucket[number]]],
        "p_max": beside_thresholds(crop.p_max, labels.manifest.thresholds),
        "flipped": bool(image.flip[number]),
        "labels": [(class_name(labels, index), f"{prob:.2f}", prob) for index, prob in list(top)[:5]],
        "truth": class_name(labels, image.target),
        "truth_prob": "" if np.isnan(truth_prob) else f"{truth_prob:.2f}",
        # An unlabelled image has nothing to be wrong about.
        "right": image.target < 0 or crop.top1 == image.target,
        "box": box_text(image, number),
    }


def beside_thresholds(p_max: float, thresholds: ThresholdsEntry) -> str:
    """p_max with two digits, or with three where two would put it on a threshold that it only lies beside."""
    edges = (thresholds.low, thresholds.mid, thresholds.top)
    return f"{p_max:.3f}" if any(abs(p_max - edge) < 0.005 for edge in edges) else f"{p_max:.2f}"


def box_text(image: Any, number: int) -> str:
    """Write a crop's box as `104x88 at 12, 30`: width x height at left, top, in pixels."""
    top, left, height, width = image.boxes[number].tolist()
    return f"{width}x{height} at {left}, {top}{', flipped' if image.flip[number] else ''}"


def image_card(labels: LabelSet, image: SampledImage, pictures: Pictures) -> dict[str, Any]:
    """Describe an image: its boxes, and its least and most confident crops."""
    return {
        "key": image.key,
        "truth": class_name(labels, image.target),
        "svg": drawn_boxes(image, pictures.images.get(image.key, "")),
        "least": [crop_card(labels, Crop(image=image, number=n), pictures) for n in ranked(image)[:EXTREMES]],
        "most": [crop_card(labels, Crop(image=image, number=n), pictures) for n in ranked(image)[::-1][:EXTREMES]],
    }


def ranked(image: Any) -> list[int]:
    """List the crop numbers, the least confident first."""
    order: list[int] = np.argsort(image.class_prob[:, 0], kind="stable").tolist()
    return order


def extremes(image: SampledImage) -> list[Crop]:
    """List the crops that `image_card` shows with pictures."""
    order = ranked(image)
    # Once each: with few crops, the least and the most confident ones overlap.
    numbers = dict.fromkeys([*order[:EXTREMES], *order[::-1][:EXTREMES]])
    return [Crop(image=image, number=number) for number in numbers]


def drawn_boxes(image: Any, picture: str) -> Markup:
    """Draw an image with up to BOXES_DRAWN boxes, spread evenly over their ranks; the first and last are labelled."""
    order = ranked(image)
    # Every step-th in the order of confidence, so that sure and unsure crops are both seen.
    step = max(1, -(-len(order) // BOXES_DRAWN))
    drawn = sorted({*order[::step], order[0], order[-1]})
    boxes = []
    for n in drawn:
        label = f"{float(image.class_prob[n, 0]):.2f}" if n in (order[0], order[-1]) else ""
        boxes.append((image.boxes[n].tolist(), int(image.bucket[n]), label))
    title = f"{image.key}: {len(drawn)} of {len(order)} crops, coloured by bucket"
    return boxes_picture(picture, (image.height, image.width), boxes, title)


def sheets(labels: LabelSet, found: Collected, pictures: Pictures) -> list[dict[str, Any]]:
    """Describe the sampled crops of each bucket, then those that are confident but wrong."""
    thresholds = labels.manifest.thresholds
    bounds = (
        f"below {thresholds.low:g}: usually background; discarded by ferkd, that is, not drawn in training",
        f"{thresholds.low:g} to {thresholds.mid:g}: context; gets the softened ground truth under ferkd",
        f"{thresholds.mid:g} to {thresholds.top:g}: a part of the object; keeps its soft label",
        f"from {thresholds.top:g}: keeps its soft label, or is thinned out, since it teaches little",
    )
    cards = []
    for code, name in enumerate(BUCKETS):
        share = found.sketch.buckets[0, code] / max(found.sketch.crops, 1)
        cards.append(
            {
                "name": BUCKET_TITLES[name],
                "code": code,
                "about": bounds[code],
                "share": percent(float(share)),
                "crops": [crop_card(labels, crop, pictures) for crop in found.sheets[code]],
            }
        )
    # Buckets 2 and 3 are the positive ones.
    _, known, right = found.sketch.buckets[:, 2:].sum(axis=1).tolist()
    cards.append(
        {
            "name": "confident but wrong",
            "code": "wrong",
            "about": "crops of the two positive buckets whose most probable class is not the ground truth: often the "
            "ground truth is wrong, or the image shows several things",
            "share": percent((known - right) / max(found.sketch.crops, 1)),
            "crops": [crop_card(labels, crop, pictures) for crop in found.wrong],
        }
    )
    return cards


def suspect_card(labels: LabelSet, suspect: Suspect, pictures: Pictures) -> dict[str, Any]:
    """Describe an image whose ground truth is doubtful."""
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
    """Make a data URI of the list, as a CSV file that a browser saves."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(CSV_COLUMNS)
    writer.writerows(csv_rows(suspects, labels.class_names))
    # Base64, since a browser may end a data URI at a # or a line break.
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(stream.getvalue().encode()).decode()


def thumb_card(labels: LabelSet, image: SampledImage, pictures: Pictures) -> dict[str, Any]:
    """Describe an image by a small picture, its size and its class."""
    return {
        "key": image.key,
        "picture": pictures.thumbs.get(image.key, ""),
        "size": f"{image.width}x{image.height}",
        "truth": class_name(labels, image.target),
    }


def slider_data(
    labels: LabelSet, sketch: Sketch, strata: list[Crop], pictures: Pictures, suggestion: Suggestion
) -> dict[str, Any]:
    """Make the numbers and texts that the page's script reads.

    For each kind of confidence, `below` counts the crops below each threshold, as `assign_buckets` compares them;
    `known` counts the crops with a ground truth among these, and `right` those named right. `exact` has the same counts
    for thresholds that may lie between two steps: (threshold, below, known, right).
    """
    edges = np.arange(SLIDER_STEPS + 1) / SLIDER_STEPS
    stored = labels.manifest.thresholds
    quantiles = {}
    confidence: dict[str, Any] = {}
    exact: dict[str, list[list[float]]] = {}
    given = np.array(sorted({*_values(stored.absolute()), *_values(suggestion.thresholds)}))
    for which in CONFIDENCES:
        counts = sketch.confidence[which]
        # Sums, so that the page's script gets any bucket's size as a difference of two numbers.
        below = [counts_below(row, edges).tolist() for row in counts]
        confidence[which] = {"below": below[0], "known": below[1], "right": below[2]}
        quantiles[which] = counts.sum(axis=1).tolist()
        rows = [given.tolist(), *(counts_below(row, given).tolist() for row in counts)]
        exact[which] = [list(one) for one in zip(*rows, strict=True)]
    return {
        "steps": SLIDER_STEPS,
        "bins": BINS,
        "totals": quantiles,
        "confidence": confidence,
        "exact": exact,
        "buckets": list(BUCKETS),
        "stored": _thresholds(stored.absolute()),
        "suggested": _thresholds(suggestion.thresholds),
        "defaults": _thresholds(Thresholds()),
        "crops": [_crop(labels, crop, pictures) for crop in strata],
    }


def _thresholds(thresholds: Thresholds) -> dict[str, Any]:
    return {"values": _values(thresholds), "confidence": thresholds.confidence}


def _values(thresholds: Thresholds) -> list[float]:
    return [thresholds.low, thresholds.mid, thresholds.top]


def _crop(labels: LabelSet, crop: Crop, pictures: Pictures) -> dict[str, Any]:
    truth_prob = float(crop.image.target_prob[crop.number])
    return {
        "key": crop.image.key,
        "crop": crop.number,
        "max": crop.p_max,
        # As `confidences_of` does where the ground truth's probability is unknown.
        "target": crop.p_max if np.isnan(truth_prob) else truth_prob,
        "named": class_name(labels, crop.top1),
        "truth": class_name(labels, crop.image.target),
        "right": crop.top1 == crop.image.target,
        "picture": pictures.crops.get((crop.image.key, crop.number), ""),
    }
