"""What a whole build will take, measured on a few batches before a week is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

from typing_extensions import Unpack

from ferkd_data.builder.job import open_tools
from ferkd_data.builder.measuring import Sample, measure, measure_on_ray, measure_together
from ferkd_data.builder.overview import overview_of
from ferkd_data.builder.plan import Part, Plan, load_or_make_plan
from ferkd_data.builder.prepare import Prepared, check_targets, prepare
from ferkd_data.builder.settings import DryRunKeywords
from ferkd_data.builder.watch.events import Overview
from ferkd_data.errors import BuildError, UsageError
from ferkd_data.scratch import Scratch
from ferkd_data.teachers import TeacherSpec


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    spec: str
    forwards: int
    milliseconds_per_crop: float
    """Of one worker."""
    hours: float
    """With all workers."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    images: int
    crops: int
    """Of all images together."""
    forwards: int
    crops_per_second: float
    """Of all workers together, with everything: decoding, cutting, all teachers."""
    hours: float
    label_bytes: int
    image_bytes: int
    """Copied into the shards; 0 for layout parquet."""
    files: int
    teachers: tuple[TeacherCost, ...]
    measured_crops: int
    workers: int
    """Never more than there are shards: a shard is one worker's."""
    worker_crops_per_second: float
    """Mean of those that were measured."""
    measured_on: tuple[str, ...]
    """The device of each worker that was measured; they worked at the same time."""
    part: str | None
    """Of the build, I/N, that all of this is about; None: the whole."""
    overview: Overview
    """What a build would say before it starts."""


def dry_run(
    source: str | Path,
    *,
    teachers: Sequence[str | TeacherSpec],
    classes: str | Path | None = None,
    precision: str = "auto",
    part: str | None = None,
    extend: bool = False,
    **changes: Unpack[DryRunKeywords],
) -> Estimate:
    """Time the build on its first images, in a temporary folder, and scale up. Takes the arguments of `build`.

    On this machine all its workers are measured, at once. On a Ray cluster it is one, or those that share a GPU. With
    `part`, what is estimated is that part of the build.

    Raises what `build` raises, BuildError when none of the first images can be used.
    """
    if extend:
        raise UsageError("a dry run (--dry-run) measures a build from the start; leave out extend (--extend)")
    mine = None if part is None else Part.parse(part)
    with (
        Scratch("dry-run") as folder,
        prepare(source, folder, teachers=teachers, classes=classes, precision=precision, **changes) as prepared,
    ):
        plan = load_or_make_plan(prepared.images, folder, images_per_shard=prepared.job.settings.shard_images)
        check_targets(plan, prepared.ensemble[0].num_classes, classes_given=classes is not None)
        shards = list(plan.shards) if mine is None else mine.shards(plan.shards)
        if plan.summary.shards and not shards:
            raise BuildError(
                f"{source}: makes {plan.summary.shards} shards, and part {mine} has none; make fewer parts"
            )
        workers = min(prepared.workplace.num_workers, len(shards))
        overview = overview_of(prepared, plan, shards)
        samples = [sample for sample in _measure(prepared, plan, shards[:workers]) if sample.images]
        if not samples:
            raise BuildError(f"{source}: none of the first images can be used; see the reasons with a build")
        return _estimate(prepared, plan, shards, mine, workers, samples, overview)


def _measure(prepared: Prepared, plan: Plan, shards: Sequence[int]) -> list[Sample]:
    """With a worker for each of `shards`, on a cluster with fewer."""
    job, devices, fleet = prepared.job, prepared.workplace.devices, prepared.workplace.fleet
    refs = (plan.refs(shard) for shard in shards)
    if fleet is not None and shards:
        return measure_on_ray(job, fleet, list(islice(refs, fleet.workers_on_a_gpu)))
    if len(devices) > 1:  # also for a single shard: its worker has its share of the cores
        return measure_together(job, devices[: len(shards)], list(refs))
    with open_tools(job, devices[0], prepared.ensemble) as tools:
        return [measure(tools, each) for each in refs]


def _estimate(
    prepared: Prepared,
    plan: Plan,
    shards: Sequence[int],
    part: Part | None,
    workers: int,
    samples: Sequence[Sample],
    overview: Overview,
) -> Estimate:
    settings, ensemble = prepared.job.settings, prepared.ensemble
    num_images = plan.count_images(shards)
    num_crops = num_images * settings.crops
    rate = fmean(sample.crops_per_second for sample in samples)
    scale = num_images / sum(sample.images for sample in samples)
    costs = [fmean(each) for each in zip(*(sample.teacher_milliseconds for sample in samples), strict=True)]
    return Estimate(
        images=num_images,
        crops=num_crops,
        forwards=num_crops * len(ensemble),
        crops_per_second=rate * workers,
        hours=num_crops / (rate * workers) / 3600,
        label_bytes=round(sum(sample.label_bytes for sample in samples) * scale),
        image_bytes=round(sum(sample.image_bytes for sample in samples) * scale),
        files=len(shards) * len(settings.block_starts) + (2 if part is None else 0),
        teachers=tuple(
            TeacherCost(
                spec=str(teacher.spec),
                forwards=num_crops,
                milliseconds_per_crop=cost,
                hours=num_crops * cost / 3.6e6 / workers,
            )
            for teacher, cost in zip(ensemble, costs, strict=True)
        ),
        measured_crops=sum(sample.crops for sample in samples),
        workers=workers,
        worker_crops_per_second=rate,
        measured_on=tuple(sample.place for sample in samples),
        part=None if part is None else str(part),
        overview=overview,
    )
