"""Write reports: `write_report` once, `LiveReport` while a build runs."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ferkd_data import extras
from ferkd_data.builder.watch.events import BuildFailed, BuildFinished, BuildStarted, Event, ShardDone
from ferkd_data.errors import FerkdError, UsageError
from ferkd_data.images import ImageSource
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.report.cards import extremes
from ferkd_data.report.collect import Collected, OnImages, collect
from ferkd_data.report.page import check_page, render_report, write_page
from ferkd_data.report.pictures import Pictures, no_pictures, take_pictures
from ferkd_data.report.suspects import CSV_COLUMNS, write_csv
from ferkd_data.report.unfinished import Unfinished, open_unfinished
from ferkd_data.storage import check_replaceable, local_path


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """Result of `write_report`.

    >>> result = fd.write_report(labels, "report.html")
    >>> result.pictures, result.crops == result.images * labels.num_crops
    ('', True)
    """

    path: Path
    """The HTML file."""
    bytes: int
    """Size of the file."""
    images: int
    """Images in the label set."""
    crops: int
    """Crops in the label set."""
    suspects: int
    """Images whose ground truth is doubtful."""
    pictures: str
    """Reason why pictures are missing; "" where none is."""


def write_report(
    labels: LabelSet | str | Path,
    path: str | Path,
    *,
    images: str | Path | ImageSource | None = None,
    csv: str | Path | None = None,
    log_json: str | Path | None = None,
    on_progress: OnImages | None = None,
) -> ReportResult:
    """Write a label set as one HTML file to look at in a browser.

    `labels` is an opened label set, a folder or a URL. A folder in which a build runs, or was interrupted, is reported
    as far as its shards are finished. Every label is read once, in memory that does not grow with the label set.

    `images` is the SOURCE that was labelled, of which a few hundred sampled images are read. Without it, a label set of
    layout webdataset shows its own images, others have no pictures. `csv` is a file to list the images with a doubtful
    ground truth in, at most 1,000. `log_json` is the log of the build, which tells how long it took. `on_progress` is
    called with (images done, images in all).

    Raises MissingExtraError without the extra `report`, LabelSetError or RemoteError where the labels cannot be read,
    SourceError or UsageError where the images are not those that were labelled, UsageError where two of the files are
    the same one.

    >>> result = fd.write_report(labels, "report.html")
    >>> result.images == len(labels), result.path.stat().st_size == result.bytes
    (True, True)
    """
    # First, so that a wrong name or log fails before minutes of reading.
    page = local_path(path)
    rows, log = (None if name is None else local_path(name) for name in (csv, log_json))
    _check_names(page, rows, log)
    check_page(page)
    if rows is not None:
        check_replaceable(rows, "list that a report wrote", ",".join(CSV_COLUMNS[:2]).encode())
    hours = None if log is None else hours_of(log)
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
    write_page(page, text)
    if rows is not None:
        write_csv(rows, found.suspects.worst(), opened.class_names)
    return ReportResult(
        path=page,
        bytes=len(text.encode()),
        images=found.sketch.images,
        crops=found.sketch.crops,
        suspects=found.suspects.found,
        pictures=pictures.problem,
    )


def _check_names(*names: Path | None) -> None:
    files = [name.resolve() for name in names if name is not None]
    twice = [file for file in files if files.count(file) > 1]
    if twice:
        raise UsageError(f"report: {twice[0]} is given twice: name different files for the page, the list and the log")


def pictures_for(labels: LabelSet, found: Collected, images: str | Path | ImageSource | None) -> Pictures:
    """Take the pictures of all samples that a report shows."""
    crops = [crop for sheet in found.sheets for crop in sheet] + found.wrong + found.strata
    crops += [crop for image in found.images for crop in extremes(image)]
    # Only what the page shows: of up to 1,000 doubtful images, a few.
    thumbs = [suspect.image for group in found.suspects.shown() for suspect in group]
    thumbs += [*found.smallest_images, *found.discarded_images]
    return take_pictures(labels, images, images=found.images, thumbs=thumbs, crops=crops)


def hours_of(log: Path) -> float:
    """Add up the hours of all runs of a build, from the log that `build --log-json` wrote; parts may share it.

    Raises UsageError where the file is no such log.
    """
    seconds: dict[str, float] = {}
    nameless = last = 0.0
    line = ""
    try:
        for line in log.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            elapsed, run = float(event["elapsed"]), event.get("run")
            # Runs that share a log, as parts do, write in turn.
            if run is not None:
                seconds[str(run)] = max(elapsed, seconds.get(str(run), 0.0))
                continue
            # An earlier version named no runs: `elapsed` starts at 0 in each, and they follow each other.
            if elapsed < last:
                nameless += last
            last = elapsed
    except OSError as error:
        raise UsageError(f"log {log}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"log {log}: {line[:80]!r} is not a line that build --log-json writes") from error
    if not line:
        raise UsageError(f"log {log}: is empty; build --log-json writes a line for each event")
    return (nameless + last + sum(seconds.values())) / 3600


LARGEST_SHARE = 0.05
"""Share of the time that reports may take while a build runs: after one that took 1 s, the next waits for 20 s."""


class LiveReport:
    """A watcher of a build that keeps a report up to date, as `build --report` does.

    While the build runs, the report covers the shards finished so far, each of which is read once. At the end it is
    written from the label set. A build into an object store is reported at the end only. `images` is the SOURCE, shown
    with its crops.

    A report that cannot be written is mentioned once on stderr, and the build goes on. Raises MissingExtraError without
    the extra `report`, and UsageError where the folder of `path` does not exist.

    >>> watcher = fd.LiveReport("report.html", images="imagenet/train")  # for fd.build(..., watchers=[watcher])
    """

    def __init__(self, path: str | Path, *, images: str | Path | None = None) -> None:
        # Now, not at the first shard, when the build may have run for an hour.
        extras.require("jinja2", extra="report", what_for="a report")
        self._path, self._images = local_path(path), images
        if not self._path.parent.is_dir():
            raise UsageError(f"report {path}: there is no folder {self._path.parent}")
        check_page(self._path)
        self._out = ""
        self._unfinished: Unfinished | None = None
        self._complained = False
        # The build's thread sets these events, and the reporting thread waits for them. While that thread lives, it
        # alone uses `_unfinished` and writes the file; `_end` joins it before the build's thread does.
        self._shard_done, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def see(self, event: Event) -> None:
        """Take note of an event of the build. Returns at once, except at the end, when it writes the last report."""
        if isinstance(event, BuildStarted):
            self._out = event.out
            # A daemon: a build that ends by an exception must not wait for a report.
            self._thread = threading.Thread(target=self._run, name="ferkd-report", daemon=True)
            self._thread.start()
        elif isinstance(event, ShardDone):
            self._shard_done.set()
        elif isinstance(event, BuildFinished):
            # A build that had ended before has not started now.
            self._out = self._out or event.out
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
            # Shards that end while a report is written or waited for are in the next one together.
            started = time.monotonic()
            self._try(self._write_so_far)
            if self._ended.wait((time.monotonic() - started) / LARGEST_SHARE):
                return

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        # A report must not end a build that may have run for days.
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
            # A report without pictures says more than none.
            pictures = no_pictures()
            pictures.problem = str(error)
            return pictures

    def _write_last(self) -> None:
        write_report(self._out, self._path, images=self._images)
