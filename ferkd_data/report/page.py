"""Make a report's page: arrange everything that its template shows, and render it as one HTML file.

The file needs nothing else and may do nothing else: its Content-Security-Policy allows its own style sheet and script,
by their digests, and pictures inside it. So nothing is fetched or sent. Texts from a label set (keys, class names,
descriptions) may be hostile; the template escapes them all, and even one that was not escaped could not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

import ferkd_data
from ferkd_data import extras
from ferkd_data.crops import CropDistribution
from ferkd_data.exchange.origins import draws_in_words, seeds_in_words
from ferkd_data.format.manifest import CropDistributionEntry, Manifest
from ferkd_data.label_set import LabelSet
from ferkd_data.report import figures, tables
from ferkd_data.report.cards import (
    BINS,
    image_card,
    sheets,
    slider_data,
    suspect_card,
    suspects_csv,
    thumb_card,
)
from ferkd_data.report.charts import Chart, reliability_chart
from ferkd_data.report.collect import Collected
from ferkd_data.report.findings import (
    SMALL_PIXELS,
    duplicates_said,
    ensemble_reliability,
    findings,
    teacher_reliability,
)
from ferkd_data.report.pictures import Pictures
from ferkd_data.report.sketch import CONFIDENCES, Sketch, counts_between
from ferkd_data.report.suspects import SURE_P_MAX, SURE_SHARE, sure_below
from ferkd_data.report.thresholds import suggest
from ferkd_data.report.unfinished import ShardProgress
from ferkd_data.storage import check_replaceable, write_atomically
from ferkd_data.words import percent

SECTIONS = (
    ("glance", "At a glance"),
    ("confidence", "How sure"),
    ("thresholds", "Thresholds"),
    ("places", "Where crops lie"),
    ("sheets", "Crops by bucket"),
    ("suspects", "Doubtful ground truth"),
    ("classes", "Classes"),
    ("teachers", "Teachers"),
    ("quality", "Data quality"),
    ("student", "What a student sees"),
    ("words", "Words"),
)


def render_report(
    labels: LabelSet,
    found: Collected,
    pictures: Pictures,
    *,
    hours: float | None = None,
    progress: ShardProgress | None = None,
) -> str:
    """Render what was collected as HTML."""
    content = page(labels, found, pictures, hours=hours, progress=progress)
    return render("report", {**content, "sections": SECTIONS}, content["sliders"], script="report.js")


def page(
    labels: LabelSet,
    found: Collected,
    pictures: Pictures,
    *,
    hours: float | None = None,
    progress: ShardProgress | None = None,
) -> dict[str, Any]:
    """Arrange the template's variables."""
    suggestion = suggest(found.sketch)
    suspects = found.suspects.worst()
    return {
        "title": f"Label set {location_name(labels)}",
        "manifest": labels.manifest,
        "identity": labels.identity,
        "progress": progress,
        "facts": facts(labels, found, hours),
        "teachers": tables.teacher_table(labels, found.sketch),
        "findings": findings(labels, found, provisional=progress is not None and progress.provisional),
        "pictures": pictures,
        "kinds": tables.kind_table(found.kinds),
        "p_max": figures.p_max_chart(found.sketch),
        "truth": figures.truth_chart(found.sketch),
        "top_k": figures.top_k_chart(found.sketch),
        "bars": histogram_bars(found.sketch),
        "highest": highest_bars(found.sketch),
        "suggestion": suggestion,
        "subject": subject(labels, found.sketch),
        "choices": tables.threshold_table(labels, found.sketch, suggestion),
        "sliders": slider_data(labels, found.sketch, found.strata, pictures, suggestion),
        "places": figures.map_charts(found.sketch),
        "images": [image_card(labels, image, pictures) for image in found.images],
        "sheets": sheets(labels, found, pictures),
        "suspects": suspect_groups(labels, found, pictures),
        "suspects_found": found.suspects.found,
        "confident_from": labels.manifest.thresholds.mid,
        # Inside the page, since the page may fetch nothing.
        "suspects_csv": suspects_csv(suspects, labels) if suspects else "",
        "suspects_kept": len(suspects),
        "classes": tables.class_table(labels, found.sketch),
        "classes_seen": int((found.sketch.class_images > 0).sum()),
        "confusions": tables.confusion_table(labels, found.sketch),
        "reliability": reliability_charts(labels, found),
        "agreement": tables.agreement_table(labels),
        "saves": tables.saves_table(labels),
        "quality": quality(labels, found, pictures),
        "in_use": figures.in_use_chart(found.sketch),
        "epoch": tables.epoch_table(found.sketch),
    }


def suspect_groups(labels: LabelSet, found: Collected, pictures: Pictures) -> list[dict[str, Any]]:
    """Describe the doubtful images in two groups: title, rule, number of images, and cards of the first ones."""
    sure, related = found.suspects.shown()
    rule = (
        f"At least {percent(SURE_SHARE, 0)} of the crops name the same other class, with a mean p_max from "
        f"{SURE_P_MAX:g}, and give the label less than {sure_below(labels.num_classes):.3g} on average. A rule of "
        "thumb: look before you change a label."
    )
    other = "All others: the class is often a related one, or the image shows several things. Both labels may be right."
    return [
        {"title": title, "rule": rule, "count": count, "cards": [suspect_card(labels, one, pictures) for one in group]}
        for title, rule, count, group in (
            ("Surely wrong", rule, found.suspects.sure, sure),
            ("Related or ambiguous class", other, found.suspects.found - found.suspects.sure, related),
        )
    ]


def location_name(labels: LabelSet) -> str:
    """Name the label set by its URL, or by its folder's name without the path, since a report is passed on."""
    return Path(labels.location).resolve().name if labels.is_local else labels.location


NAMED_CLASSES = 5


def subject(labels: LabelSet, sketch: Sketch) -> str:
    """Say which images the label set is about: how many, and of which classes."""
    images = f"{sketch.images:,} image{'' if sketch.images == 1 else 's'}"
    classes = np.flatnonzero(sketch.class_images)
    if not len(classes):
        return f"{images} without a ground truth"
    named = ", ".join(tables.class_name(labels, int(number)) for number in classes[:NAMED_CLASSES])
    more = ", …" if len(classes) > NAMED_CLASSES else ""
    return f"{images} of {len(classes):,} class{'' if len(classes) == 1 else 'es'} ({named}{more})"


def facts(labels: LabelSet, found: Collected, hours: float | None) -> list[tuple[str, str]]:
    """List the facts about a label set as (name, value)."""
    manifest, sketch = labels.manifest, found.sketch
    size = sum(file.bytes for shard in manifest.shards for file in shard.files)
    forwards = sketch.crops * len(manifest.teachers)
    thresholds = manifest.thresholds
    cost = f"{forwards:,} teacher forwards" + (f", {duration(hours)}" if hours is not None else "")
    kind = "p_max" if thresholds.confidence == "max" else "the ground truth's probability"
    layout: tuple[str, str] = ("Layout", manifest.layout)
    # The files of a view hold more than it shows, and those of an ensemble are of one label set only.
    if manifest.statistics.crops == sketch.crops:
        each = f"{size / max(sketch.crops, 1):.1f} bytes per crop"
        layout = ("Size", f"{size / 1e6:,.2f} MB, {each}, layout {manifest.layout}")
    return [
        ("Images", f"{sketch.images:,}" + (f", {manifest.rejects.rows:,} rejected" if manifest.rejects.rows else "")),
        ("Crops", f"{sketch.crops:,}: {labels.num_crops:,} of each image"),
        ("Classes", f"{manifest.num_classes:,}, of which {int((sketch.class_images > 0).sum()):,} have images"),
        ("Soft labels", f"the {manifest.top_k} most probable classes of each crop"),
        layout,
        ("Cost", cost),
        *distributions(manifest),
        ("Thresholds", f"{thresholds.low:g}, {thresholds.mid:g}, {thresholds.top:g} on {kind}"),
        ("Source", manifest.source.description),
        ("Written by", f"{manifest.created_by.name} {manifest.created_by.version}, format version {manifest.version}"),
        ("Identity", f"{labels.identity[:16]} (SHA-256 of the manifest)"),
    ]  # fmt: skip


def duration(hours: float) -> str:
    """Write hours as `1.5 hours`, shorter times as `12.0 minutes` or `3 seconds`."""
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.0f} seconds"


def distributions(manifest: Manifest) -> list[tuple[str, str]]:
    """List how crops were drawn as (name, value): all of them, those of each kind, or of each merged label set."""

    def described(crops: CropDistribution | CropDistributionEntry) -> str:
        return (
            f"area {crops.scale[0]:g} to {crops.scale[1]:g} of the image, ratio {crops.ratio[0]:.3g} to "
            f"{crops.ratio[1]:.3g}, flipped with probability {crops.hflip:g}"
        )

    seeds = seeds_in_words(manifest)
    if not manifest.kinds:
        draws = draws_in_words(manifest, described)
        if draws:
            return [(crops.capitalize(), drawn) for crops, drawn in draws]
        return [("Crop distribution", f"{described(manifest.crop_distribution)}, {seeds}")]
    return [
        (
            f"Crop kind {kind.name}",
            f"{kind.crops:,} of each image, for {kind.size} px: {described(kind.distribution)}, {seeds}",
        )
        for kind in manifest.kinds
    ]


def histogram_bars(sketch: Sketch) -> dict[str, list[tuple[float, int]]]:
    """Compute the bars of the sliders' histogram by kind of confidence: (height in percent of the tallest, crops)."""
    edges = np.arange(BINS + 1) / BINS
    bars = {}
    for which in CONFIDENCES:
        counts = counts_between(sketch.confidence[which][0], edges).tolist()
        largest = max(1, *counts)
        bars[str(which)] = [(100 * count / largest, count) for count in counts]
    return bars


def highest_bars(sketch: Sketch) -> dict[str, str]:
    """Compute the share of the crops in the tallest bar of the sliders' histogram, by kind of confidence."""
    edges = np.arange(BINS + 1) / BINS
    return {
        str(which): f"{100 * max(counts_between(sketch.confidence[which][0], edges)) / max(sketch.crops, 1):.1f} %"
        for which in CONFIDENCES
    }


def reliability_charts(labels: LabelSet, found: Collected) -> list[Chart]:
    """Draw the calibration of the ensemble, then of each teacher where the build counted it; empty without targets."""
    teachers = labels.manifest.teachers
    curve = ensemble_reliability(found.sketch, teachers[0].name if len(teachers) == 1 else "all teachers together")
    curves = [curve, *teacher_reliability(labels)] if sum(curve.crops) else []
    return [reliability_chart(one) for one in curves]


def quality(labels: LabelSet, found: Collected, pictures: Pictures) -> dict[str, Any]:
    """Describe rejects, duplicates, small images, and images without a crop in use."""
    return {
        "rejects": [
            {"reason": reason, "count": count, "examples": found.reject_examples.get(reason, [])}
            for reason, count in found.rejects.most_common()
        ],
        "duplicates": [
            {"keys": group.keys, "truths": [tables.class_name(labels, target) for target in group.targets],
             "conflict": group.conflict, "more": group.images - len(group.keys)}
            for group in found.duplicates
        ],
        "duplicates_said": duplicates_said(found),
        "small_pixels": SMALL_PIXELS,
        "sides": tables.side_table(found.sketch),
        "smallest": [thumb_card(labels, image, pictures) for image in found.smallest_images
                     if min(image.height, image.width) < SMALL_PIXELS],
        "discarded": [thumb_card(labels, image, pictures) for image in found.discarded_images],
        "discarded_count": int(found.sketch.in_use[0]),
    }  # fmt: skip


def render(name: str, content: dict[str, Any], data: Any = None, *, script: str = "") -> str:
    """Render the template `NAME.html.j2`. `script` names a file of JavaScript, `data` is the JSON that it reads.

    Raises MissingExtraError without the extra `report`.
    """
    jinja2 = extras.require("jinja2", extra="report", what_for="a report")
    markup = extras.require("markupsafe", extra="report", what_for="a report").Markup
    style, code = asset("report.css"), asset(script) if script else ""
    # Strict: a variable that is misspelled in a template is an error, and not an empty place on the page.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(asset(f"{name}.html.j2"))
    text: str = template.render(
        **content,
        version=ferkd_data.__version__,
        policy=policy(style, code),
        # Ours, read from the package, and so not escaped. `data` is made inert below instead.
        style=markup(style),
        script=markup(code),
        data=markup(inert_json(data)),
    )
    return text


def asset(name: str) -> str:
    """Read a file from the package's folder `assets`."""
    return (resources.files("ferkd_data.report") / "assets" / name).read_text(encoding="utf-8")


def policy(style: str, script: str) -> str:
    """Write the page's Content-Security-Policy, which allows this style sheet and script by their digests."""
    return "; ".join(
        [
            # Nothing is allowed but what follows: no fonts, frames, connections or other pages' pictures.
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'" if script else "script-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _digest(text: str) -> str:
    # The form that a Content-Security-Policy wants.
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def inert_json(data: Any) -> str:
    """Write JSON that cannot end the HTML element around it, whatever its strings are."""
    # `</script>` would end the element even inside a string; \u003c is the same character to JSON.
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def check_page(path: Path) -> None:
    """Raise UsageError for an existing file that is no HTML page."""
    check_replaceable(path, "HTML page", b"<html", b"<!doctype html")


def write_page(path: Path, text: str) -> None:
    """Write a page under another name and rename it, so that a browser never loads half a file.

    Raises StorageFullError.
    """
    with write_atomically(path) as aside:
        aside.write_text(text, encoding="utf-8")
