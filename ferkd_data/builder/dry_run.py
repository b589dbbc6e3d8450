"""Estimate what a build will take, from a few seconds of its own work, before a week is spent.

The workers of the build itself are started and asked to measure: each labels images of its own shard for some seconds,
all at the same time, since they share what a machine has. Nothing is written to OUT.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from typing_extensions import Unpack

from ferkd_data.builder.engines import labels_here, workers_of
from ferkd_data.builder.labelling.job import open_tools
from ferkd_data.builder.labelling.measuring import Sample, measure
from ferkd_data.builder.overview import overview_of
from ferkd_data.builder.plan import Part, Plan, load_or_make_plan
from ferkd_data.builder.prepare import Prepared, check_plan_targets, make_request, open_request
from ferkd_data.builder.settings import DryRunKeywords
from ferkd_data.builder.watch.events import Overview
from ferkd_data.builder.workers.messages import (
    AnyWorker,
    Failed,
    Measured,
    Message,
    Ready,
    Slow,
    WorkerLostError,
    Workers,
)
from ferkd_data.builder.workers.pool import POLL_SECONDS, failure
from ferkd_data.errors import BuildError, TeacherError, UsageError
from ferkd_data.images import ImageRef
from ferkd_data.scratch import Scratch
from ferkd_data.teachers import TeacherSpec


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    """The time that one teacher takes of a build."""

    spec: str
    forwards: int
    milliseconds_per_crop: float
    """Milliseconds of one worker."""
    hours: float
    """Hours with all workers."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Time, bytes and files that a build will take."""

    images: int
    crops: int
    """Crops of all images together."""
    forwards: int
    crops_per_second: float
    """Rate of all workers together, with everything: decoding, cutting, all teachers."""
    hours: float
    label_bytes: int
    image_bytes: int
    """Bytes of images copied into the shards; 0 for layout parquet."""
    files: int
    teachers: tuple[TeacherCost, ...]
    measured_crops: int
    workers: int
    """Workers of the build; never more than shards, since a shard is labelled by one worker."""
    worker_crops_per_second: float
    """Mean rate of the workers that were measured."""
    measured_on: tuple[str, ...]
    """The device of each worker that was measured, all at the same time."""
    part: str | None
    """The part I/N that all of this is about; None: the whole build."""
    overview: Overview
    """The overview that the build would show before it starts."""


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
    """Time a build on its first images and scale up. Takes the arguments of `build`, but for OUT.

    On this machine all workers are measured, at once. On a Ray cluster it is one, or those that share a GPU. With
    `part`, that part of the build is estimated.

    Raises what `build` raises, BuildError when none of the first images can be used.
    """
    if extend:
        raise UsageError("a dry run (--dry-run) measures a build from the start; leave out extend (--extend)")
    mine = None if part is None else Part.parse(part)
    # The temporary folder stands in for OUT: the plan is made in it, and nothing else.
    with (
        Scratch("dry-run") as folder,
        open_request(
            make_request(source, folder, teachers=teachers, classes=classes, precision=precision, **changes)
        ) as prepared,
    ):
        job = prepared.job
        plan = load_or_make_plan(
            prepared.images,
            folder,
            images_per_shard=job.settings.shard_images,
            fail_on_reject=job.fail_on_reject,
        )
        check_plan_targets(plan, prepared.teachers[0].num_classes, classes_given=classes is not None)
        shards = list(plan.shards) if mine is None else mine.shards(plan.shards)
        if plan.summary.shards and not shards:
            raise BuildError(
                f"{source}: makes {plan.summary.shards} shards, and part {mine} has none; make fewer parts"
            )
        workers = min(prepared.placement.num_workers, len(shards))
        overview = overview_of(prepared, plan, shards)
        samples = [sample for sample in _measure(prepared, plan, shards[:workers]) if sample.images]
        if not samples:
            raise BuildError(f"{source}: none of the first images can be used; see the reasons with a build")
        return _estimate(prepared, plan, shards, mine, workers, samples, overview)


def _measure(prepared: Prepared, plan: Plan, shards: Sequence[int]) -> list[Sample]:
    """Measure a worker for each of `shards`; on a cluster, those of one GPU."""
    # Without OUT, workers look for no plan, which a node of a cluster would not see in the driver's temporary folder.
    job, placement = replace(prepared.job, out=None), prepared.placement
    if placement.cluster is not None:
        # To measure on all nodes would take the whole cluster from others (docs/decisions.md).
        shards = shards[: placement.cluster.workers_on_a_gpu]
    else:
        placement = replace(placement, devices=placement.devices[: len(shards)])
    refs = [plan.refs(shard) for shard in shards]
    if not labels_here(job, prepared.placement):  # also for a single shard: its worker has its share of the cores
        return measure_with(workers_of(job, placement), refs) if shards else []
    device = prepared.placement.devices[0]
    with open_tools(job, device, prepared.teachers) as tools:
        return [measure(tools, each, device) for each in refs]


def measure_with(workers: Workers[AnyWorker], shards: Sequence[Sequence[ImageRef]]) -> list[Sample]:
    """Start a worker for each of `shards`, and have them measure at the same time when all of them are ready.

    Raises what a worker raised, BuildError for one that died.
    """
    samples: dict[int, Sample] = {}
    num_ready = 0
    with ExitStack() as stack:
        started = []
        for number in range(len(shards)):
            started.append(workers.start(number))
            # At once after its start: whatever is raised below, no worker outlives this function.
            stack.callback(started[-1].end, 0)
        while len(samples) < len(started):
            waiting = [worker for worker in started if worker.number not in samples]
            for worker in workers.with_messages(waiting, POLL_SECONDS):
                message = _hear(worker, workers.when_none_gets_ready)
                if isinstance(message, Ready):
                    # Nobody measures while others still load their teachers: these would take its cores.
                    num_ready += 1
                    if num_ready == len(started):
                        for each, refs in zip(started, shards, strict=True):
                            each.measure(refs)
                elif isinstance(message, Measured):
                    samples[worker.number] = message.sample
    return [samples[number] for number in sorted(samples)]


def _hear(worker: AnyWorker, hint: str) -> Message:
    try:
        message = worker.receive()
    except WorkerLostError as error:
        raise BuildError(f"{worker} {error} while it was measured; {hint}") from error
    if isinstance(message, Failed):
        raise failure(message, str(worker))
    if isinstance(message, Slow):
        raise TeacherError(
            f"teacher {message.teacher}: takes longer than --teacher-timeout for a batch; {worker} was ended"
        )
    return message


def _estimate(
    prepared: Prepared,
    plan: Plan,
    shards: Sequence[int],
    part: Part | None,
    workers: int,
    samples: Sequence[Sample],
    overview: Overview,
) -> Estimate:
    settings, teachers = prepared.job.settings, prepared.teachers
    num_images = plan.count_images(shards)
    num_crops = num_images * settings.crops
    label_files = len(shards) * len(settings.block_starts)
    # The workers were measured at the same time, so the rate of one has the share of the others in it already.
    rate = fmean(sample.crops_per_second for sample in samples)
    scale = num_images / sum(sample.images for sample in samples)
    costs = [fmean(each) for each in zip(*(sample.teacher_milliseconds for sample in samples), strict=True)]
    return Estimate(
        images=num_images,
        crops=num_crops,
        forwards=num_crops * len(teachers),
        crops_per_second=rate * workers,
        hours=num_crops / (rate * workers) / 3600,
        label_bytes=round(
            sum(sample.label_bytes for sample in samples) * scale
            + fmean(sample.file_bytes for sample in samples) * label_files
        ),
        image_bytes=round(sum(sample.image_bytes for sample in samples) * scale),
        # Two more: rejects.parquet and manifest.json, which `finish` writes for a build in parts.
        files=label_files + (2 if part is None else 0),
        teachers=tuple(
            TeacherCost(
                spec=str(teacher.spec),
                forwards=num_crops,
                milliseconds_per_crop=cost,
                # An hour has 3.6 million milliseconds.
                hours=num_crops * cost / 3.6e6 / workers,
            )
            for teacher, cost in zip(teachers, costs, strict=True)
        ),
        measured_crops=sum(sample.crops for sample in samples),
        workers=workers,
        worker_crops_per_second=rate,
        measured_on=tuple(sample.location for sample in samples),
        part=None if part is None else str(part),
        overview=overview,
    )
