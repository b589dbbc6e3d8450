"""What a whole build will take, measured on a few batches before a week is spent."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferkd_data.builder.crop_batches import Rejected
from ferkd_data.builder.job import stored_thresholds
from ferkd_data.builder.label_shard import TeacherCounts, Tools, label_shard, view_of
from ferkd_data.builder.plan import load_or_make_plan
from ferkd_data.builder.prepare import check_targets, with_changes
from ferkd_data.errors import BuildError
from ferkd_data.images import open_source
from ferkd_data.replay import empty_batch
from ferkd_data.shards.columns import ImageLabels
from ferkd_data.shards.writers import write_shard
from ferkd_data.teachers import Teacher, TeacherSpec, load_teachers
from ferkd_data.teachers.compiled import compile_teachers

MEASURE_SECONDS = 15.0
"""How long the whole pipeline is timed."""
TEACHER_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    spec: str
    forwards: int
    milliseconds_per_crop: float
    hours: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    images: int
    crops: int
    """Of all images together."""
    forwards: int
    crops_per_second: float
    """Measured with everything: decoding, cutting, all teachers."""
    hours: float
    label_bytes: int
    image_bytes: int
    """Copied into the shards; 0 for layout parquet."""
    files: int
    teachers: tuple[TeacherCost, ...]
    measured_crops: int


def dry_run(
    source: str | Path,
    *,
    teachers: Sequence[str | TeacherSpec],
    classes: str | Path | None = None,
    precision: str = "auto",
    **changes: Any,
) -> Estimate:
    """Time the build on its first images, in a temporary folder, and scale up. Takes the arguments of `build`.

    Raises what `build` raises, BuildError when none of the first images can be used.
    """
    settings, resources = with_changes(None, None, changes)
    images = open_source(source, classes=None if classes is None else Path(classes))
    device = resources.resolved_device()
    ensemble = load_teachers(teachers, device=device, precision=precision)
    workers, batch_size = resources.resolved_workers(), resources.resolved_batch_size()
    if resources.compile:
        ensemble = compile_teachers(ensemble, batch_size)
    with (
        tempfile.TemporaryDirectory(prefix="ferkd-data-dry-run-") as name,
        ThreadPoolExecutor(workers) as executor,
    ):
        folder = Path(name)
        plan = load_or_make_plan(images, folder, images_per_shard=settings.shard_images)
        check_targets(plan, ensemble[0].num_classes, classes_given=classes is not None)
        tools = Tools(
            source=images,
            teachers=ensemble,
            settings=settings,
            thresholds=stored_thresholds(settings),
            device=device,
            batch_size=batch_size,
            workers=workers,
            executor=executor,
        )
        costs = [_teacher_milliseconds(teacher, batch_size, device) for teacher in ensemble]
        rows, rate = _measure(plan.refs(0) if plan.summary.shards else [], tools)
        if not rows:
            raise BuildError(f"{source}: none of the first images can be used; see the reasons with a build")
        _, files = write_shard(folder, 0, rows, layout=settings.layout, block_starts=settings.block_starts)
        written = sum(file.bytes for file in files)
    num_images = plan.summary.images
    num_crops = num_images * settings.crops
    copied = sum(len(image) for _, image in rows) if settings.layout == "webdataset" else 0
    scale = num_images / len(rows)
    files_per_shard = len(settings.block_starts)
    return Estimate(
        images=num_images,
        crops=num_crops,
        forwards=num_crops * len(ensemble),
        crops_per_second=rate,
        hours=num_crops / rate / 3600,
        label_bytes=round((written - copied) * scale),
        image_bytes=round(copied * scale),
        files=plan.summary.shards * files_per_shard + 2,
        teachers=tuple(
            TeacherCost(
                spec=str(teacher.spec),
                forwards=num_crops,
                milliseconds_per_crop=cost,
                hours=num_crops * cost / 3.6e6,
            )
            for teacher, cost in zip(ensemble, costs, strict=True)
        ),
        measured_crops=len(rows) * settings.crops,
    )


def _measure(refs: list[Any], tools: Tools) -> tuple[list[tuple[ImageLabels, bytes]], float]:
    """Label images for about MEASURE_SECONDS; the first batch warms up and is not counted."""
    marks: list[tuple[float, int]] = []

    def on_batch(crops: int, rejects: int) -> None:
        marks.append((time.perf_counter(), crops))

    rows = []
    stream = label_shard(refs, tools, Rejected(), TeacherCounts.zeros(len(tools.teachers)), on_batch)
    started = time.perf_counter()
    for row in stream:
        rows.append(row)
        if time.perf_counter() - started > MEASURE_SECONDS:
            break
    if len(marks) < 2:
        return rows, sum(crops for _, crops in marks) / max(time.perf_counter() - started, 1e-9)
    return rows, sum(crops for _, crops in marks[1:]) / (marks[-1][0] - marks[0][0])


def _teacher_milliseconds(teacher: Teacher, batch_size: int, device: str) -> float:
    view = view_of(teacher)
    batch = empty_batch(batch_size, view.size).random_(0, 256).to(device)
    teacher.logits(batch).cpu()
    times = []
    for _ in itertools.repeat(None, TEACHER_BATCHES):
        started = time.perf_counter()
        teacher.logits(batch).cpu()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2] * 1000 / batch_size
