"""The builder: makes a label set of images and teachers. `build` in run.py is the way in."""

from __future__ import annotations

from ferkd_data.builder.dry_run import Estimate, dry_run
from ferkd_data.builder.run import BuildResult, PartResult, build, build_part, finish
from ferkd_data.builder.settings import BuildSettings, Resources
from ferkd_data.builder.stop import Stop, stop_on_sigterm
from ferkd_data.builder.watch.events import Event, Overview, Progress, Watcher
from ferkd_data.builder.watch.logs import JsonLog, MetricsFile

__all__ = [
    "BuildResult",
    "BuildSettings",
    "Estimate",
    "Event",
    "JsonLog",
    "MetricsFile",
    "Overview",
    "PartResult",
    "Progress",
    "Resources",
    "Stop",
    "Watcher",
    "build",
    "build_part",
    "dry_run",
    "finish",
    "stop_on_sigterm",
]
