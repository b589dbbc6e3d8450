"""`write_report`: a label set as one HTML file to look at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ferkd_data.errors import UsageError
from ferkd_data.images import ImageSource
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.report.cards import extremes
from ferkd_data.report.collect import Collected, OnImages, collect
from ferkd_data.report.page import page
from ferkd_data.report.pictures import Pictures, take_pictures
from ferkd_data.report.render import SECTIONS, render, write_page
from ferkd_data.report.suspects import write_csv
from ferkd_data.report.unfinished import Progress, open_unfinished


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    path: Path
    bytes: int
    images: int
    crops: int
    suspects: int
    """Images whose ground truth is doubtful."""
    pictures: str
    """Why some pictures are missing; "" where none is."""


def write_report(
    labels: LabelSet | str | Path,
    path: str | Path,
    *,
    images: str | Path | ImageSource | None = None,
    csv: str | Path | None = None,
    log_json: str | Path | None = None,
    on_progress: OnImages | None = None,
) -> ReportResult:
    """Write the label set as one HTML file to look at.

    `fd.write_report("out", "report.html", images="imagenet/train")`

    It reads every label once, in memory that does not grow with the set, and a few hundred sampled images. Without
    `images`, a label set of layout webdataset shows its own, others have no pictures. `csv` is where the images with a
    doubtful ground truth are listed, at most 1,000. A folder in which a build is at work, or was interrupted, is
    reported as far as its shards are finished. `log_json` is the build's log, which knows how long it took.
    `on_progress` gets (images done, images in all).

    Raises MissingExtraError without the extra `report`, LabelSetError or RemoteError where the labels cannot be read,
    SourceError or UsageError where the images are not those.
    """
    hours = None if log_json is None else hours_of(Path(log_json))
    progress = None
    unfinished = None if isinstance(labels, LabelSet) else open_unfinished(labels)
    if unfinished is not None:
        unfinished.add_new_shards()
        opened, found, progress = unfinished.labels(), unfinished.found(), unfinished.progress
    else:
        opened = labels if isinstance(labels, LabelSet) else open_labels(labels)
        found = collect(opened, on_progress)
    pictures = pictures_for(opened, found, images)
    text = render_report(opened, found, pictures, hours=hours, progress=progress)
    write_page(Path(path), text)
    if csv is not None:
        write_csv(Path(csv), found.suspects.worst(), opened.class_names)
    return ReportResult(
        path=Path(path),
        bytes=len(text.encode()),
        images=found.sketch.images,
        crops=found.sketch.crops,
        suspects=found.suspects.found,
        pictures=pictures.problem,
    )


def render_report(
    labels: LabelSet,
    found: Collected,
    pictures: Pictures,
    *,
    hours: float | None = None,
    progress: Progress | None = None,
) -> str:
    """The HTML of what was collected."""
    content = page(labels, found, pictures, hours=hours, progress=progress)
    return render("report", {**content, "sections": SECTIONS}, content["sliders"], script="report.js")


def pictures_for(labels: LabelSet, found: Collected, images: str | Path | ImageSource | None) -> Pictures:
    """All that a report shows of its samples."""
    crops = [crop for sheet in found.sheets for crop in sheet] + found.wrong + found.strata
    crops += [crop for image in found.images for crop in extremes(image)]
    thumbs = [suspect.image for group in found.suspects.shown() for suspect in group]
    thumbs += [*found.smallest_images, *found.discarded_images]
    return take_pictures(labels, images, images=found.images, thumbs=thumbs, crops=crops)


def hours_of(log: Path) -> float:
    """How long a build took, all of its runs together, from the log that `build --log-json` wrote.

    Raises UsageError where the file is no such log.
    """
    seconds = last = 0.0
    line = ""
    try:
        for line in log.read_text(encoding="utf-8").splitlines():
            elapsed = float(json.loads(line)["elapsed"])
            # Each run counts from 0.
            if elapsed < last:
                seconds += last
            last = elapsed
    except OSError as error:
        raise UsageError(f"log {log}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"log {log}: {line[:80]!r} is not a line that build --log-json writes") from error
    return (seconds + last) / 3600
