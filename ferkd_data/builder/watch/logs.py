"""Watchers for machines: `JsonLog`, one JSON object in a line, and `MetricsFile` for Prometheus.

The metrics file has the format of the node exporter's textfile collector. Both go on after an error of their own file:
a full log disk must not end a build of a week.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from ferkd_data.builder.watch.events import BuildFailed, BuildFinished, Event, Progress
from ferkd_data.errors import StorageFullError, UsageError
from ferkd_data.storage import check_replaceable, write_atomically

PROGRESS_SECONDS = 10.0
"""Seconds between two lines of progress; all other events are logged as they come."""


class JsonLog:
    """Appends events to a file: progress every few seconds, all others as they come.

    A line has `event`, `time` (UTC), `elapsed` seconds since this run opened the log, `run`, which is a random name of
    the run, and the event's own fields. Several runs may share a file. Where the log cannot be written any more, one
    line on stderr says so. Raises UsageError where it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise UsageError(f"log {path}: cannot be opened ({error.strerror})") from error
        self._path = path
        # Not from a generator that a training may have seeded: two parts would get the same.
        self._run = secrets.token_hex(8)
        self._opened = time.monotonic()
        self._logged_progress = float("-inf")
        self._progress: Progress | None = None
        """The newest progress, unless it is logged."""
        self._broken = False

    def see(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Progress):
            self._progress = event
            if now - self._logged_progress < PROGRESS_SECONDS:
                return
            self._logged_progress = now
        # The last progress, which the interval held back, belongs before the end.
        elif isinstance(event, (BuildFinished, BuildFailed)) and self._progress is not None:
            self._write(self._progress, now)
        if isinstance(event, Progress):
            self._progress = None
        self._write(event, now)

    def _write(self, event: Event, now: float) -> None:
        stamp = datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="milliseconds")
        elapsed = round(now - self._opened, 3)
        line = {"event": name_of(event), "time": stamp, "elapsed": elapsed, "run": self._run, **asdict(event)}
        try:
            # Opened for each event, so that the file may be rotated, and several parts may share it.
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            if not self._broken:
                print(f"ferkd-data: log {self._path}: cannot be written any more ({error.strerror})", file=sys.stderr)
            self._broken = True


def name_of(event: Event) -> str:
    """Return the name of an event in the log: `shard_done` for a ShardDone."""
    return re.sub(r"(?<!^)([A-Z])", r"_\1", type(event).__name__).lower()


WRITE_SECONDS = 5.0
GAUGES = {
    "images_done": "Images labelled or rejected.",
    "images_total": "Images of the build.",
    "shards_done": "Image shards that are whole.",
    "shards_total": "Image shards of the build.",
    "rejects": "Images that could not be used.",
    "forwards_done": "Forward passes of this run.",
    "forwards_total": "Forward passes that this run needs in all.",
    "crops_per_second": "Rate over this run.",
    "seconds_left": "Expected time to the end.",
}


class MetricsFile:
    """Rewrites a file every few seconds, atomically, since a collector may read it at any time.

    Where it cannot be written any more, that is said once on stderr. Raises UsageError where it cannot be created.
    """

    def __init__(self, path: Path, write_seconds: float = WRITE_SECONDS) -> None:
        self._path = path
        self._write_seconds = write_seconds
        self._written = float("-inf")
        self._progress: Progress | None = None
        self._broken = False
        check_replaceable(path, "file of metrics", b"ferkd_build_running")
        try:
            self._write(running=1)
        except (OSError, StorageFullError) as error:
            raise UsageError(f"metrics {path}: cannot be written ({error})") from error

    def see(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._progress = event
            if time.monotonic() - self._written >= self._write_seconds:
                self._try_to_write(running=1)
        elif isinstance(event, (BuildFinished, BuildFailed)):
            self._try_to_write(running=0)

    def _try_to_write(self, *, running: int) -> None:
        try:
            self._write(running=running)
        except (OSError, StorageFullError) as error:
            if not self._broken:
                print(f"ferkd-data: metrics {self._path}: cannot be written any more ({error})", file=sys.stderr)
            self._broken = True

    def _write(self, *, running: int) -> None:
        # Before writing, so that a disk that fails is tried every few seconds and not with every batch.
        self._written = time.monotonic()
        lines = _metric("running", "1 while the build runs, 0 after its end.", {"": running})
        progress = self._progress
        for name, text in GAUGES.items() if progress is not None else ():
            value = getattr(progress, name)
            # A value that is not known yet is left out: the text format has no null.
            lines += _metric(name, text, {} if value is None else {"": value})
        if progress is not None:
            rates = {f'{{worker="{worker.worker}"}}': worker.crops_per_second for worker in progress.workers}
            lines += _metric("worker_crops_per_second", "Rate of one worker over the last minute.", rates)
            lines += _metric("stragglers", "Workers far below the median.", {"": len(progress.stragglers)})
        with write_atomically(self._path) as aside:
            aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _metric(name: str, text: str, values: dict[str, float]) -> list[str]:
    full = f"ferkd_build_{name}"
    samples = [f"{full}{labels} {value}" for labels, value in values.items()]
    return [f"# HELP {full} {text}", f"# TYPE {full} gauge", *samples] if samples else []
