"""Crops and images as cards of a page: their picture, their labels and their ground truth.

Tables of a report, made from the sums that one pass collected.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ferkd_data.format.manifest import ThresholdsEntry
from ferkd_data.label_set import LabelSet
from ferkd_data.labels.buckets import BUCKETS, Thresholds
from ferkd_data.report.charts import Cell, Column, Table, boxes_picture, percent
from ferkd_data.report.collect import Collected
from ferkd_data.report.figures import BUCKET_TITLES
from ferkd_data.report.pictures import Pictures
from ferkd_data.report.samples import CSV_COLUMNS, Crop, SampledImage, Suspect, csv_rows
from ferkd_data.report.sketch import SIDE_EDGES, Sketch, counts_below
from ferkd_data.report.thresholds import Suggestion, class_name

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
        "p_max": beside_thresholds(crop.p_max, labels.manifest.thresholds),
        "flipped": bool(image.flip[number]),
        "labels": [(class_name(labels, index), f"{prob:.2f}", prob) for index, prob in list(top)[:5]],
        "truth": class_name(labels, image.target),
        "truth_prob": "" if np.isnan(said) else f"{said:.2f}",
        "right": image.target < 0 or crop.top1 == image.target,
        "box": box_text(image, number),
    }


def beside_thresholds(p_max: float, thresholds: ThresholdsEntry) -> str:
    """p_max with two digits, or with three where two would put it on a threshold that it only lies beside."""
    edges = (thresholds.low, thresholds.mid, thresholds.top)
    return f"{p_max:.3f}" if any(abs(p_max - edge) < 0.005 for edge in edges) else f"{p_max:.2f}"


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


CLASSES_SHOWN = 1000
CONFUSIONS_SHOWN = 50


def teacher_table(labels: LabelSet, sketch: Sketch) -> Table:
    """One row for each teacher, and what is known of its accuracy on these crops."""
    counted = labels.statistics
    columns = (
        Column(title="teacher", numeric=False),
        Column(title="right on crops"),
        Column(title="input", unit="px"),
        Column(title="weight"),
        Column(title="temperature"),
        Column(title="precision", numeric=False),
        Column(title="weights' SHA-256", numeric=False),
    )
    rows = []
    for i, teacher in enumerate(labels.manifest.teachers):
        known = counted.teacher_top1_matches_target and counted.crops_with_target
        right = percent(counted.teacher_top1_matches_target[i] / counted.crops_with_target) if known else "not counted"
        rows.append(
            [teacher.name, right, str(teacher.size), f"{teacher.weight:g}", f"{teacher.temperature:g}",
             teacher.precision, teacher.digest[:12]]
        )  # fmt: skip
    _, known_crops, right_crops = (int(row.sum()) for row in sketch.confidence["max"])
    if len(labels.manifest.teachers) > 1 and known_crops:
        right = percent(right_crops / known_crops)
        rows.append([f"together ({labels.manifest.ensemble})", right, "", "", "", "", ""])
    return Table(caption="Teachers, and how often each names the ground truth", columns=columns, rows=rows)


def threshold_table(labels: LabelSet, sketch: Sketch, suggestion: Suggestion) -> Table:
    """Stored, suggested and default thresholds side by side: each bucket's share, and how often teachers are right."""
    columns = (
        Column(title="thresholds", numeric=False),
        Column(title="values", numeric=False),
        *(Column(title=name.replace("_", " "), numeric=False) for name in BUCKETS),
    )
    stored = labels.manifest.thresholds.absolute()
    choices = [("stored", stored), ("suggested", suggestion.thresholds), ("ferkd-data's defaults", Thresholds())]
    if stored == Thresholds():
        choices = [("stored, ferkd-data's defaults", stored), choices[1]]
    rows: list[list[Cell | str]] = []
    for name, chosen in choices:
        edges = np.array([chosen.low, chosen.mid, chosen.top])
        counts = sketch.confidence[chosen.confidence]
        crops, known, right = (
            np.diff([0, *counts_below(row, edges).tolist(), int(row.sum())]).tolist() for row in counts
        )
        on = "" if chosen.confidence == "max" else " on the ground truth's probability"
        cells = [
            percent(crops[i] / max(sketch.crops, 1))
            + (f", right {100 * right[i] / known[i]:.1f} %" if known[i] else "")
            for i in range(len(BUCKETS))
        ]
        rows.append([name, f"{chosen.low:.3g}, {chosen.mid:.3g}, {chosen.top:.3g}{on}", *cells])
    caption = "Thresholds to choose from: each bucket's share of the crops, and how often the teachers are right"
    return Table(caption=caption, columns=columns, rows=rows)


def saves_table(labels: LabelSet) -> Table | None:
    """Who is right where another is wrong; None for one teacher, or where the build did not count it."""
    counted, teachers = labels.statistics, labels.manifest.teachers
    if len(teachers) < 2 or not counted.teacher_right_together or not counted.crops_with_target:
        return None
    both = np.array(counted.teacher_right_together)
    saved = both.diagonal()[:, None] - both
    columns = (
        Column(title="right / wrong", numeric=False),
        *(Column(title=teacher.name, unit="%") for teacher in teachers),
    )
    rows: list[list[Cell | str]] = []
    for i, teacher in enumerate(teachers):
        shares = (100 * saved[i] / counted.crops_with_target).tolist()
        cells = [Cell("", None) if i == j else Cell(f"{share:.1f}", share) for j, share in enumerate(shares)]
        rows.append([teacher.name, *cells])
    caption = "Who saves whom: share of crops on which the teacher of the row is right and the one of the column wrong"
    return Table(caption=caption, columns=columns, rows=rows)


def class_table(labels: LabelSet, sketch: Sketch) -> Table | None:
    """Classes, the hardest first; None without a ground truth."""
    seen = np.flatnonzero(sketch.class_images)
    if not len(seen):
        return None
    crops = sketch.class_images * sketch.num_crops
    right = sketch.class_right[seen] / crops[seen]
    order = seen[np.lexsort((seen, right))][:CLASSES_SHOWN]
    columns = (
        Column(title="class", numeric=False),
        Column(title="images"),
        Column(title="crops right", unit="%"),
        Column(title="mean p_max"),
        Column(title="named so", unit="crops"),
    )
    rows: list[list[Cell | str]] = []
    for number in order.tolist():
        total = int(crops[number])
        share, mean = sketch.class_right[number] / total, sketch.class_p_max[number] / total
        rows.append(
            [class_name(labels, number), _count(sketch.class_images[number]), Cell(f"{100 * share:.1f}", float(share)),
             Cell(f"{mean:.3f}", float(mean)), _count(sketch.class_named[number])]
        )  # fmt: skip
    return Table(caption="Classes, the hardest first", columns=columns, rows=rows, sortable=True)


def _count(number: Any) -> Cell:
    return Cell(f"{int(number):,}", float(number))


def confusion_table(labels: LabelSet, sketch: Sketch) -> Table | None:
    """Pairs of ground truth and named class, the most frequent first; None where there are none."""
    pairs = sorted(sketch.confusions.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS_SHOWN]
    if not pairs:
        return None
    columns = (
        Column(title="ground truth", numeric=False),
        Column(title="named", numeric=False),
        Column(title="crops"),
        Column(title="of the class's crops", unit="%"),
    )
    rows: list[list[Cell | str]] = []
    for (truth, named), count in pairs:
        share = count / (sketch.class_images[truth] * sketch.num_crops)
        rows.append(
            [
                class_name(labels, truth),
                class_name(labels, named),
                _count(count),
                Cell(f"{100 * share:.1f}", float(share)),
            ]
        )
    return Table(caption="Most confused pairs of classes", columns=columns, rows=rows, sortable=True)


def side_table(sketch: Sketch) -> Table:
    """Images by their shorter side."""
    edges = (0, *SIDE_EDGES)
    names = [*(f"{low} to {high - 1}" for low, high in itertools.pairwise(edges)), f"{edges[-1]} and more"]
    total = max(sketch.images, 1)
    rows: list[list[Cell | str]] = [
        [name, _count(count), f"{100 * count / total:.1f}"]
        for name, count in zip(names, sketch.sides.tolist(), strict=True)
        if count
    ]
    columns = (Column(title="pixels", numeric=False), Column(title="images"), Column(title="share", unit="%"))
    return Table(caption="Images by their shorter side", columns=columns, rows=rows)
