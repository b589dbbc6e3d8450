"""Make the tables of a report from the collected sums and the manifest, and name buckets and classes."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ferkd_data.crop_kinds import CropKind
from ferkd_data.label_set import LabelSet
from ferkd_data.labels.buckets import BUCKETS, Thresholds
from ferkd_data.labels.statistics import Statistics
from ferkd_data.report.charts import Cell, Column, Table
from ferkd_data.report.sketch import SIDE_EDGES, Sketch, counts_below
from ferkd_data.report.thresholds import Suggestion
from ferkd_data.words import in_percent, percent

BUCKET_TITLES = {name: name.replace("_", " ") for name in BUCKETS}
CLASSES_SHOWN = 1000
CONFUSIONS_SHOWN = 50


def class_name(labels: LabelSet, number: int) -> str:
    """Name a class for people: by the first of its names, or by its number."""
    if number < 0:
        return "unlabelled"
    return short_names(labels.class_names)[number] if labels.class_names else f"class {number}"


@functools.lru_cache(maxsize=4)
def short_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the first name of each class, with the class's number where several classes have the same one.

    Of ImageNet's classes, two begin with `crane` and two with `maillot`.

    >>> short_names(("crane", "cat, house cat", "crane, derrick"))
    ('crane (class 0)', 'cat', 'crane (class 2)')
    """
    firsts = [name.split(",")[0] for name in names]
    uses = Counter(firsts)
    return tuple(first if uses[first] == 1 else f"{first} (class {number})" for number, first in enumerate(firsts))


def teacher_table(labels: LabelSet, sketch: Sketch) -> Table:
    """List the teachers with their settings, and their accuracy on these crops where the build counted it."""
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
        # Counted over all crops that were labelled, of which fewer may be shown.
        known = counted.teacher_top1_matches_target and counted.crops_with_target and counted.crops == sketch.crops
        right = percent(counted.teacher_top1_matches_target[i] / counted.crops_with_target) if known else "not counted"
        rows.append(
            [teacher.name, right, str(teacher.size), f"{teacher.weight:g}", f"{teacher.temperature:g}",
             teacher.precision, teacher.digest[:12]]
        )  # fmt: skip
    _, known_crops, right_crops = (int(row.sum()) for row in sketch.confidence["max"])
    if len(labels.manifest.teachers) > 1 and known_crops:
        right = percent(right_crops / known_crops)
        # Of the stored labels, which are those of the ensemble.
        rows.append([f"together ({labels.manifest.ensemble})", right, "", "", "", "", ""])
    return Table(caption="Teachers, and how often each names the ground truth", columns=columns, rows=rows)


def kind_table(kinds: Sequence[tuple[CropKind, Statistics]]) -> Table | None:
    """List the crop kinds: their crops, the share of each bucket as stored, and how often the teachers are right."""
    if not kinds:
        return None
    known = all(counted.crops_with_target for _, counted in kinds)
    columns = (
        Column(title="crop kind", numeric=False),
        Column(title="crops"),
        *(Column(title=BUCKET_TITLES[name], unit="%") for name in BUCKETS),
        *([Column(title="teachers right")] if known else []),
    )
    rows = [
        [
            f"{kind.name} ({kind.size} px)",
            f"{counted.crops:,}",
            *(in_percent(crops / max(counted.crops, 1)) for crops in counted.bucket_counts),
            *([percent(counted.top1_matches_target / counted.crops_with_target)] if known else []),
        ]
        for kind, counted in kinds
    ]
    return Table(caption="Crop kinds, and the buckets of each", columns=columns, rows=rows)


def threshold_table(labels: LabelSet, sketch: Sketch, suggestion: Suggestion) -> Table:
    """Compare stored, suggested and default thresholds: each bucket's share, and how often the teachers are right."""
    columns = (
        Column(title="thresholds", numeric=False),
        Column(title="values", numeric=False),
        *(Column(title=name.replace("_", " "), numeric=False) for name in BUCKETS),
    )
    stored = labels.manifest.thresholds.absolute()
    choices = [("stored", stored), ("suggested", suggestion.thresholds), ("ferkd-data's defaults", Thresholds())]
    # One row where both are the same.
    if stored == Thresholds():
        choices = [("stored, ferkd-data's defaults", stored), choices[1]]
    rows: list[list[Cell | str]] = []
    for name, chosen in choices:
        edges = np.array([chosen.low, chosen.mid, chosen.top])
        counts = sketch.confidence[chosen.confidence]
        crops, known, right = (
            # Differences of what lies below each edge: the crops in each bucket.
            np.diff([0, *counts_below(row, edges).tolist(), int(row.sum())]).tolist()
            for row in counts
        )
        on = "" if chosen.confidence == "max" else " on the ground truth's probability"
        cells = [
            percent(crops[i] / max(sketch.crops, 1)) + (f", right {percent(right[i] / known[i])}" if known[i] else "")
            for i in range(len(BUCKETS))
        ]
        rows.append([name, f"{chosen.low:.3g}, {chosen.mid:.3g}, {chosen.top:.3g}{on}", *cells])
    caption = "Thresholds to choose from: each bucket's share of the crops, and how often the teachers are right"
    return Table(caption=caption, columns=columns, rows=rows)


def saves_table(labels: LabelSet) -> Table | None:
    """List how often each teacher is right where another is wrong.

    None for one teacher, and where the build did not count it.
    """
    counted, teachers = labels.statistics, labels.manifest.teachers
    if len(teachers) < 2 or not counted.teacher_right_together or not counted.crops_with_target:
        return None
    both = np.array(counted.teacher_right_together)
    # both[i, j] counts crops on which i and j are right, both[i, i] those of i; the difference is i right, j wrong.
    saved = both.diagonal()[:, None] - both
    columns = (
        Column(title="right / wrong", numeric=False),
        *(Column(title=teacher.name, unit="%") for teacher in teachers),
    )
    rows: list[list[Cell | str]] = []
    for i, teacher in enumerate(teachers):
        shares = (saved[i] / counted.crops_with_target).tolist()
        cells = [Cell("", None) if i == j else Cell(in_percent(share), share) for j, share in enumerate(shares)]
        rows.append([teacher.name, *cells])
    caption = "Who saves whom: share of crops on which the teacher of the row is right and the one of the column wrong"
    return Table(caption=caption, columns=columns, rows=rows)


def class_table(labels: LabelSet, sketch: Sketch) -> Table | None:
    """List the classes, the hardest first; None without a ground truth."""
    seen = np.flatnonzero(sketch.class_images)
    if not len(seen):
        return None
    crops = sketch.class_images * sketch.num_crops
    right = sketch.class_right[seen] / crops[seen]
    # By the share that is right, ties by number.
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
            [class_name(labels, number), _count(sketch.class_images[number]), Cell(in_percent(share), float(share)),
             Cell(f"{mean:.3f}", float(mean)), _count(sketch.class_named[number])]
        )  # fmt: skip
    return Table(caption="Classes, the hardest first", columns=columns, rows=rows, sortable=True)


def _count(number: Any) -> Cell:
    return Cell(f"{int(number):,}", float(number))


def confusion_table(labels: LabelSet, sketch: Sketch) -> Table | None:
    """List the confused pairs of ground truth and named class, the most frequent first; None where there are none."""
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
                Cell(in_percent(share), float(share)),
            ]
        )
    return Table(caption="Most confused pairs of classes", columns=columns, rows=rows, sortable=True)


def side_table(sketch: Sketch) -> Table:
    """Count the images by their shorter side."""
    edges = (0, *SIDE_EDGES)
    names = [*(f"{low} to {high - 1}" for low, high in itertools.pairwise(edges)), f"{edges[-1]} and more"]
    total = max(sketch.images, 1)
    rows: list[list[Cell | str]] = [
        [name, _count(count), in_percent(count / total)]
        for name, count in zip(names, sketch.sides.tolist(), strict=True)
        if count
    ]
    columns = (Column(title="pixels", numeric=False), Column(title="images"), Column(title="share", unit="%"))
    return Table(caption="Images by their shorter side", columns=columns, rows=rows)


def epoch_table(sketch: Sketch) -> Table:
    """List the shares of the buckets among the crops of an epoch, under `fkd` and under `ferkd`."""
    fkd = sketch.buckets[0] / max(sketch.crops, 1)
    # Over images with crops in use, as the caption says: the others get the softened ground truth.
    used = max(sketch.images - int(sketch.in_use[0]), 1)
    ferkd = sketch.epoch_share / used
    softened = "softened ground truth" if sketch.confidence["max"][1].any() else "soft label"
    uses = ("discarded", softened, "soft label", "soft label")
    rows = [
        [BUCKET_TITLES[name], percent(float(fkd[i])), "soft label", percent(float(ferkd[i])), uses[i]]
        for i, name in enumerate(BUCKETS)
    ]
    columns = (
        Column(title="bucket", numeric=False),
        Column(title="share under fkd"),
        Column(title="target under fkd", numeric=False),
        Column(title="share under ferkd"),
        Column(title="target under ferkd", numeric=False),
    )
    return Table(caption="An epoch's mix of buckets, over images with crops in use", columns=columns, rows=rows)


def agreement_table(labels: LabelSet) -> Table | None:
    """List the shares of crops on which two teachers name the same class; None where the build did not count it."""
    counted, teachers = labels.statistics, labels.manifest.teachers
    if len(teachers) < 2 or not counted.teacher_agreement or not counted.crops:
        return None
    columns = (Column(title="teacher", numeric=False), *(Column(title=teacher.name, unit="%") for teacher in teachers))
    rows: list[list[Cell | str]] = [
        [teacher.name, *(Cell(in_percent(count / counted.crops), count) for count in row)]
        for teacher, row in zip(teachers, counted.teacher_agreement, strict=True)
    ]
    return Table(
        caption="Share of crops on which two teachers name the same most probable class", columns=columns, rows=rows
    )
