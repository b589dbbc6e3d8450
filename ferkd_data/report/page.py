"""Everything that a report's template shows, as one plain structure.

Strings of strangers (keys, class names, descriptions) are passed on as they are: the template escapes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ferkd_data.label_set import LabelSet
from ferkd_data.report import figures
from ferkd_data.report.cards import (
    class_table,
    confusion_table,
    image_view,
    saves_table,
    sheets,
    side_table,
    suspect_view,
    suspects_csv,
    teacher_table,
    threshold_table,
    thumb_view,
)
from ferkd_data.report.charts import Chart, percent, reliability_chart
from ferkd_data.report.collect import Collected
from ferkd_data.report.findings import (
    SMALL_PIXELS,
    duplicates_said,
    ensemble_reliability,
    findings,
    teacher_reliability,
)
from ferkd_data.report.pictures import Pictures
from ferkd_data.report.samples import SURE_P_MAX, SURE_SHARE, sure_below
from ferkd_data.report.sketch import CONFIDENCES, Sketch, counts_between
from ferkd_data.report.thresholds import BINS, class_name, slider_data, suggest
from ferkd_data.report.unfinished import Progress


def page(
    labels: LabelSet,
    found: Collected,
    pictures: Pictures,
    *,
    hours: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The template's variables."""
    suggestion = suggest(found.sketch)
    suspects = found.suspects.worst()
    return {
        "title": f"Label set {place_name(labels)}",
        "manifest": labels.manifest,
        "identity": labels.identity,
        "progress": progress,
        "facts": facts(labels, found, hours),
        "teachers": teacher_table(labels, found.sketch),
        "findings": findings(labels, found),
        "pictures": pictures,
        "p_max": figures.p_max_chart(found.sketch),
        "truth": figures.truth_chart(found.sketch),
        "top_k": figures.top_k_chart(found.sketch),
        "bars": histogram_bars(found.sketch),
        "highest": highest_bars(found.sketch),
        "suggestion": suggestion,
        "subject": subject(labels, found.sketch),
        "choices": threshold_table(labels, found.sketch, suggestion),
        "sliders": slider_data(labels, found.sketch, found.strata, pictures, suggestion),
        "places": figures.place_charts(found.sketch),
        "images": [image_view(labels, image, pictures) for image in found.images],
        "sheets": sheets(labels, found, pictures),
        "suspects": suspect_groups(labels, found, pictures),
        "suspects_found": found.suspects.found,
        "confident_from": labels.manifest.thresholds.mid,
        "confident_on": "p_max" if labels.manifest.thresholds.confidence == "max" else "ground truth's probability",
        "suspects_csv": suspects_csv(suspects, labels) if suspects else "",
        "suspects_kept": len(suspects),
        "classes": class_table(labels, found.sketch),
        "classes_seen": int((found.sketch.class_images > 0).sum()),
        "confusions": confusion_table(labels, found.sketch),
        "reliability": reliability_charts(labels, found),
        "agreement": figures.agreement_table(labels),
        "saves": saves_table(labels),
        "quality": quality(labels, found, pictures),
        "in_use": figures.in_use_chart(found.sketch),
        "epoch": figures.epoch_table(found.sketch),
    }


def suspect_groups(labels: LabelSet, found: Collected, pictures: Pictures) -> list[dict[str, Any]]:
    """Doubtful images in two groups, each with its title, its rule, how many there are, and cards of the first."""
    sure, related = found.suspects.shown()
    rule = (
        f"At least {percent(SURE_SHARE, 0)} of the crops name the same other class, with a mean p_max from "
        f"{SURE_P_MAX:g}, and give the label less than {sure_below(labels.num_classes):.3g} on average. A rule of "
        "thumb: look before you change a label."
    )
    other = "All others: the class is often a related one, or the image shows several things. Both labels may be right."
    return [
        {"title": title, "rule": rule, "count": count, "cards": [suspect_view(labels, one, pictures) for one in group]}
        for title, rule, count, group in (
            ("Surely wrong", rule, found.suspects.sure, sure),
            ("Related or ambiguous class", other, found.suspects.found - found.suspects.sure, related),
        )
    ]


def place_name(labels: LabelSet) -> str:
    """The label set's folder or URL; of a local folder the name alone, since a report is passed on."""
    return Path(labels.location).resolve().name if labels.is_local else labels.location


NAMED_CLASSES = 5


def subject(labels: LabelSet, sketch: Sketch) -> str:
    """Say which images the label set is about: how many, and of which classes."""
    images = f"{sketch.images:,} image{'' if sketch.images == 1 else 's'}"
    classes = np.flatnonzero(sketch.class_images)
    if not len(classes):
        return f"{images} without a ground truth"
    named = ", ".join(class_name(labels, int(number)) for number in classes[:NAMED_CLASSES])
    more = ", …" if len(classes) > NAMED_CLASSES else ""
    return f"{images} of {len(classes):,} class{'' if len(classes) == 1 else 'es'} ({named}{more})"


def facts(labels: LabelSet, found: Collected, hours: float | None) -> list[tuple[str, str]]:
    """What the label set is, as names and values."""
    manifest, sketch = labels.manifest, found.sketch
    size = sum(file.bytes for shard in manifest.shards for file in shard.files)
    forwards = sketch.crops * len(manifest.teachers)
    thresholds, crops = manifest.thresholds, manifest.crop_distribution
    cost = f"{forwards:,} teacher forwards" + (f", {hours:,.1f} hours" if hours is not None else "")
    distribution = (
        f"area {crops.scale[0]:g} to {crops.scale[1]:g} of the image, ratio {crops.ratio[0]:.3g} to "
        f"{crops.ratio[1]:.3g}, flipped with probability {crops.hflip:g}, seed {manifest.seed}"
    )
    kind = "p_max" if thresholds.confidence == "max" else "the ground truth's probability"
    return [
        ("Images", f"{sketch.images:,}" + (f", {manifest.rejects.rows:,} rejected" if manifest.rejects.rows else "")),
        ("Crops", f"{sketch.crops:,}: {manifest.num_crops:,} of each image"),
        ("Classes", f"{manifest.num_classes:,}, of which {int((sketch.class_images > 0).sum()):,} have images"),
        ("Soft labels", f"the {manifest.top_k} most probable classes of each crop"),
        ("Size", f"{size / 1e6:,.2f} MB, {size / max(sketch.crops, 1):.1f} bytes per crop, layout {manifest.layout}"),
        ("Cost", cost),
        ("Crop distribution", distribution),
        ("Thresholds", f"{thresholds.low:g}, {thresholds.mid:g}, {thresholds.top:g} on {kind}"),
        ("Source", manifest.source.description),
        ("Written by", f"{manifest.created_by.name} {manifest.created_by.version}, format version {manifest.version}"),
        ("Identity", f"{labels.identity[:16]} (SHA-256 of the manifest)"),
    ]  # fmt: skip


def histogram_bars(sketch: Sketch) -> dict[str, list[tuple[float, int]]]:
    """(height in percent of the largest, crops) of each bar of the sliders' histogram, by kind of confidence."""
    edges = np.arange(BINS + 1) / BINS
    bars = {}
    for which in CONFIDENCES:
        counts = counts_between(sketch.confidence[which][0], edges).tolist()
        largest = max(1, *counts)
        bars[str(which)] = [(100 * count / largest, count) for count in counts]
    return bars


def highest_bars(sketch: Sketch) -> dict[str, str]:
    """The share of the crops that the tallest bar of the sliders' histogram stands for, by kind of confidence."""
    edges = np.arange(BINS + 1) / BINS
    return {
        str(which): f"{100 * max(counts_between(sketch.confidence[which][0], edges)) / max(sketch.crops, 1):.1f} %"
        for which in CONFIDENCES
    }


def reliability_charts(labels: LabelSet, found: Collected) -> list[Chart]:
    """The ensemble's, then each teacher's where the build counted it; none without a ground truth."""
    teachers = labels.manifest.teachers
    curve = ensemble_reliability(found.sketch, teachers[0].name if len(teachers) == 1 else "all teachers together")
    curves = [curve, *teacher_reliability(labels)] if sum(curve.crops) else []
    return [reliability_chart(one) for one in curves]


def quality(labels: LabelSet, found: Collected, pictures: Pictures) -> dict[str, Any]:
    """Rejects, duplicates, small images, and images without a crop in use."""
    return {
        "rejects": [
            {"reason": reason, "count": count, "examples": found.reject_examples.get(reason, [])}
            for reason, count in found.rejects.most_common()
        ],
        "duplicates": [
            {"keys": group.keys, "truths": [class_name(labels, target) for target in group.targets],
             "conflict": len(set(group.targets)) > 1}
            for group in found.duplicates
        ],
        "duplicates_said": duplicates_said(found),
        "small_pixels": SMALL_PIXELS,
        "sides": side_table(found.sketch),
        "smallest": [thumb_view(labels, image, pictures) for image in found.smallest_images
                     if min(image.height, image.width) < SMALL_PIXELS],
        "discarded": [thumb_view(labels, image, pictures) for image in found.discarded_images],
        "discarded_count": int(found.sketch.in_use[0]),
    }  # fmt: skip
