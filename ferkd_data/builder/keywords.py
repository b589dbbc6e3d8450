"""Types of the keyword arguments that `build`, `build_part` and `dry_run` pass on: type checkers find a misspelt one.

A test compares the names and types with the fields of `BuildSettings` and `Resources`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from ferkd_data.buckets import QuantileThresholds, Thresholds
from ferkd_data.builder.settings import BuildSettings, Resources
from ferkd_data.crops import CropDistribution
from ferkd_data.manifest import Layout
from ferkd_data.teachers import TeacherSpec


class SettingsKeywords(TypedDict, total=False):
    """Fields of `BuildSettings` and of `Resources`."""

    crops: int
    crops_per_block: int
    top_k: int
    layout: Layout
    images_per_shard: int | None
    seed: int
    distribution: CropDistribution
    augment: Sequence[str]
    ensemble: Literal["mean", "logits", "geometric"]
    thresholds: Thresholds | QuantileThresholds
    max_pixels: int

    device: str
    processes: int | None
    batch_size: int | None
    workers: int | None
    compile: bool
    teacher_timeout: float | None
    engine: Literal["local", "ray"]
    ray_address: str | None
    gpus_per_teacher: float


class BuildKeywords(SettingsKeywords, total=False):
    """Arguments of `build` that `build_part` passes on."""

    teachers: Sequence[str | TeacherSpec]
    settings: BuildSettings | None
    resources: Resources | None
    classes: str | Path | None
    precision: str
    on_error: Literal["reject", "fail"]
    extend: bool


class DryRunKeywords(SettingsKeywords, total=False):
    """Arguments of `build` that `dry_run` passes on."""

    settings: BuildSettings | None
    resources: Resources | None
    on_error: Literal["reject", "fail"]
