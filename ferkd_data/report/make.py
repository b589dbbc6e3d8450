"""Render a report's content as one HTML file that needs nothing else and may do nothing else.

The file's Content-Security-Policy allows exactly its own style sheet and script, by their digests, and pictures that it
carries with it. So nothing is fetched or sent, and a string out of a hostile label set could not run even if it were
not escaped, which every one is.

`write_report`: a label set as one HTML file to look at.

A report that a build keeps up to date: a watcher that writes it anew after each shard, beside the labelling.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import ferkd_data
from ferkd_data import extras
from ferkd_data.builder.watch.events import BuildFailed, BuildFinished, BuildStarted, Event, ShardDone
from ferkd_data.errors import FerkdError, UsageError
from ferkd_data.images import ImageSource
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.report.cards import extremes
from ferkd_data.report.collect import Collected, OnImages, collect
from ferkd_data.report.page import page
from ferkd_data.report.pictures import Pictures, no_pictures, take_pictures
from ferkd_data.report.samples import write_csv
from ferkd_data.report.unfinished import Progress, Unfinished, open_unfinished
from ferkd_data.storage import write_atomically

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


def render(name: str, content: dict[str, Any], data: Any = None, *, script: str = "") -> str:
    """The HTML of the template `NAME.html.j2`; `data` is what its script, a file's name or none, reads.

    Raises MissingExtraError without the extra `report`.
    """
    jinja2 = extras.require("jinja2", extra="report", what_for="a report")
    markup = extras.require("markupsafe", extra="report", what_for="a report").Markup
    style, code = asset("report.css"), asset(script) if script else ""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(asset(f"{name}.html.j2"))
    text: str = template.render(
        **content,
        version=ferkd_data.__version__,
        policy=policy(style, code),
        style=markup(style),
        script=markup(code),
        data=markup(inert_json(data)),
    )
    return text


def asset(name: str) -> str:
    """A file beside this module."""
    return (resources.files("ferkd_data.report") / "assets" / name).read_text(encoding="utf-8")


def policy(style: str, script: str) -> str:
    """The page's Content-Security-Policy."""
    return "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'" if script else "script-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def inert_json(data: Any) -> str:
    """JSON that cannot end the element which holds it, whatever its strings are."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_page(path: Path, text: str) -> None:
    """Aside and renamed, so that a browser never loads half a file. Raises StorageFullError."""
    with write_atomically(path) as aside:
        aside.write_text(text, encoding="utf-8")


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


LARGEST_SHARE = 0.05
"""Of the time, that a report may take while the build runs: after one that took a second, the next waits for 20."""


class LiveReport:
    """A watcher for `fd.build(..., watchers=[fd.LiveReport("report.html", images="imagenet/train")])`.

    Until the build has ended the report is about its finished shards, which are read once each. Then it is written from
    the label set. OUT in an object store is reported at the end alone. `images` are shown with their crops.

    A report that cannot be written is said once on stderr; the build goes on. Raises MissingExtraError and UsageError
    at the start.
    """

    def __init__(self, path: str | Path, *, images: str | Path | None = None) -> None:
        extras.require("jinja2", extra="report", what_for="a report")
        self._path, self._images = Path(path), images
        if not self._path.parent.is_dir():
            raise UsageError(f"report {path}: there is no folder {self._path.parent}")
        self._out = ""
        self._unfinished: Unfinished | None = None
        self._complained = False
        # The build's thread sets these, and the thread that writes reports waits for them. That thread alone touches
        # `_unfinished`, and the file while it lives.
        self._shard_done, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def see(self, event: Event) -> None:
        """Called by the build. Quick, but at the end, where the last report is written."""
        if isinstance(event, BuildStarted):
            self._out = event.out
            self._thread = threading.Thread(target=self._run, name="ferkd-report", daemon=True)
            self._thread.start()
        elif isinstance(event, ShardDone):
            self._shard_done.set()
        elif isinstance(event, BuildFinished):
            self._end()
            self._try(self._write_last)
        elif isinstance(event, BuildFailed):
            self._end()
            self._try(self._write_so_far)

    def _end(self) -> None:
        self._ended.set()
        self._shard_done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            self._shard_done.wait()
            self._shard_done.clear()
            if self._ended.is_set():
                return
            started = time.monotonic()
            self._try(self._write_so_far)
            if self._ended.wait((time.monotonic() - started) / LARGEST_SHARE):
                return

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, FerkdError) as error:
            if not self._complained:
                print(f"ferkd-data: report {self._path}: cannot be written ({error})", file=sys.stderr)
            self._complained = True

    def _write_so_far(self) -> None:
        self._unfinished = self._unfinished or (open_unfinished(self._out) if self._out else None)
        if self._unfinished is not None and self._unfinished.add_new_shards():
            labels, found = self._unfinished.labels(), self._unfinished.found()
            pictures = self._pictures(labels, found)
            write_page(self._path, render_report(labels, found, pictures, progress=self._unfinished.progress))

    def _pictures(self, labels: LabelSet, found: Collected) -> Pictures:
        try:
            return pictures_for(labels, found, self._images)
        except FerkdError as error:
            pictures = no_pictures()
            pictures.problem = str(error)
            return pictures

    def _write_last(self) -> None:
        write_report(self._out, self._path, images=self._images)
