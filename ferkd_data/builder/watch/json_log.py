"""A build's log for machines: one JSON object in a line, on the disk with each event."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from ferkd_data.builder.watch.events import BuildFailed, BuildFinished, Event, Progress
from ferkd_data.errors import UsageError

PROGRESS_SECONDS = 10.0
"""How often progress is logged; all other events are logged as they come."""


class JsonLog:
    """Appends to a file.

    A line has `event`, `time` (UTC) and `elapsed` seconds since the log was opened, then the event's own fields.

    A log that cannot be written any more is said once on stderr; the build goes on. Raises UsageError at the start.
    """

    def __init__(self, path: Path, progress_seconds: float = PROGRESS_SECONDS) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise UsageError(f"log {path}: cannot be opened ({error.strerror})") from error
        self._path = path
        self._progress_seconds = progress_seconds
        self._opened = time.monotonic()
        self._logged_progress = float("-inf")
        self._progress: Progress | None = None
        """The newest, where it was not logged."""
        self._broken = False

    def see(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Progress):
            self._progress = event
            if now - self._logged_progress < self._progress_seconds:
                return
            self._logged_progress = now
        elif isinstance(event, (BuildFinished, BuildFailed)) and self._progress is not None:
            self._write(self._progress, now)
        if isinstance(event, Progress):
            self._progress = None
        self._write(event, now)

    def _write(self, event: Event, now: float) -> None:
        stamp = datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="milliseconds")
        line = {"event": name_of(event), "time": stamp, "elapsed": round(now - self._opened, 3), **asdict(event)}
        try:
            # Opened anew for each, so that it may be moved away meanwhile, and several parts may share it.
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            if not self._broken:
                print(f"ferkd-data: log {self._path}: cannot be written any more ({error.strerror})", file=sys.stderr)
            self._broken = True


def name_of(event: Event) -> str:
    """`shard_done` for a ShardDone."""
    return re.sub(r"(?<!^)([A-Z])", r"_\1", type(event).__name__).lower()
