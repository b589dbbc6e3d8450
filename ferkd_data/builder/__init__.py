"""The builder: images and teachers in, a label set out."""

from __future__ import annotations

from ferkd_data.builder.dry_run import Estimate, dry_run
from ferkd_data.builder.events import Event, Progress, Watcher
from ferkd_data.builder.json_log import JsonLog
from ferkd_data.builder.metrics_file import MetricsFile
from ferkd_data.builder.run import BuildResult, PartResult, build, build_part, finish
from ferkd_data.builder.settings import BuildSettings, Resources
from ferkd_data.builder.stop import Stop, stop_on_sigterm

__all__ = [
    "BuildResult",
    "BuildSettings",
    "Estimate",
    "Event",
    "JsonLog",
    "MetricsFile",
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
