"""A report that a build keeps up to date: a watcher that writes it anew after each shard, beside the labelling."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ferkd_data import extras
from ferkd_data.builder.watch.events import BuildFailed, BuildFinished, BuildStarted, Event, ShardDone
from ferkd_data.errors import FerkdError, UsageError
from ferkd_data.label_set import LabelSet
from ferkd_data.report.collect import Collected
from ferkd_data.report.make import pictures_for, render_report, write_report
from ferkd_data.report.pictures import Pictures, no_pictures
from ferkd_data.report.render import write_page
from ferkd_data.report.unfinished import Unfinished, open_unfinished

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
