"""The engine: who labels the shards of a build that have no record yet.

With one worker on this machine it is the calling process, whose teachers are loaded already. Otherwise it is a pool of
worker processes, or of actors on a Ray cluster, each with teachers of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ferkd_data.builder.labelling.forwards import NullObserver
from ferkd_data.builder.labelling.job import Job, Tools, open_tools
from ferkd_data.builder.labelling.write_behind import WriteBehind
from ferkd_data.builder.overview import overview_of
from ferkd_data.builder.plan import Plan
from ferkd_data.builder.prepare import Prepared
from ferkd_data.builder.state import BuildFolder
from ferkd_data.builder.stop import Stop
from ferkd_data.builder.watch.events import BuildStarted, ImageRejected, Watcher
from ferkd_data.builder.watch.progress import ProgressCounter
from ferkd_data.builder.workers.messages import Workers
from ferkd_data.builder.workers.pool import WorkerPool
from ferkd_data.builder.workers.processes import WorkerProcesses
from ferkd_data.builder.workers.ray_actors import RayWorkers
from ferkd_data.builder.workers.ray_cluster import Placement
from ferkd_data.format.rejects import read_rejects


def label_shards(
    prepared: Prepared, folder: BuildFolder, plan: Plan, shards: Sequence[int], watcher: Watcher, stop: Stop
) -> None:
    """Label each of `shards` that has no record yet. Raises what labelling raises, BuildStoppedError on a stop."""
    job, placement = prepared.job, prepared.placement
    counter = _counter(prepared, plan, shards, watcher)
    todo = []
    # A shard with a record is done: what a resumed build finds here is not labelled again.
    for shard, record in folder.files.records(shards):
        if record is None:
            todo.append(shard)
        else:
            counter.shard_found(record)
    _report_start(prepared, plan, counter)
    watcher.see(overview_of(prepared, plan, todo))
    # Until here a signal may end the process at once. From here on shards are in work, and it waits for these.
    with stop.labelling():
        if labels_here(job, placement):
            with open_tools(job, placement.devices[0], prepared.teachers, _ReportHalvings(counter)) as tools:
                label_here(folder, plan, tools, todo, counter, stop)
            return
        # Before any worker loads its own, which may need all the memory of the first GPU.
        prepared.free_teachers()
        timeout = job.resources.teacher_timeout
        with WorkerPool(workers_of(job, placement), folder, counter, stop, timeout) as pool:
            pool.label(todo)


def labels_here(job: Job, placement: Placement) -> bool:
    """Return whether the calling process is the one worker. A teacher's time can only be limited in another process."""
    return placement.cluster is None and len(placement.devices) == 1 and job.resources.teacher_timeout is None


def workers_of(job: Job, placement: Placement) -> Workers[Any]:
    if placement.cluster is None:
        return WorkerProcesses(job, placement.devices)
    return RayWorkers(job, placement.cluster)


def label_here(
    folder: BuildFolder, plan: Plan, tools: Tools, shards: Sequence[int], counter: ProgressCounter, stop: Stop
) -> None:
    """Label the shards one after the other in this process."""
    counter.worker_started(0, tools.device)
    with WriteBehind(folder, plan, tools, counter.shard_done) as behind:
        for shard in shards:
            if stop.requested:
                behind.settle()
                raise stop.error()
            counter.shard_begun(shard)

            def on_batch(crops: int, rejects: int, shard: int = shard) -> None:
                counter.batch(shard, crops, rejects)
                if stop.expired:
                    raise stop.error()

            behind.label(shard, on_batch)
            counter.worker_idle(0)
        behind.settle()


class _ReportHalvings(NullObserver):
    """Tells the watchers when a teacher of this process gets smaller batches."""

    def __init__(self, counter: ProgressCounter) -> None:
        self.counter = counter

    def halved(self, teacher: str, crops: int) -> None:
        self.counter.halved(teacher, crops)


def _counter(prepared: Prepared, plan: Plan, shards: Sequence[int], watcher: Watcher) -> ProgressCounter:
    crops = prepared.job.settings.crops
    images = plan.shard_images(shards)
    return ProgressCounter(
        watcher=watcher,
        crops_of=lambda shard: crops - plan.first_crop(shard),
        shards_total=len(shards),
        images_total=sum(images),
        crops_total=sum(n * (crops - plan.first_crop(shard)) for shard, n in zip(shards, images, strict=True)),
        num_teachers=len(prepared.teachers),
        # Rejects of the listing belong to no shard: the whole build counts them, a part of it does not.
        rejects_before=plan.summary.rejects if len(shards) == len(plan.shards) else 0,
    )


def _report_start(prepared: Prepared, plan: Plan, counter: ProgressCounter) -> None:
    job = prepared.job
    crops = counter.crops_total - counter.crops_found
    started = BuildStarted(
        out=str(job.out),
        source=job.source,
        teachers=tuple(map(str, job.teachers)),
        settings=asdict(job.settings),
        devices=tuple(prepared.placement.devices),
        extends=prepared.base is not None,
        shards=counter.shards_total,
        shards_done=counter.shards_done,
        images=counter.images_total,
        crops=crops,
        forwards=crops * counter.num_teachers,
    )
    counter.watcher.see(started)
    # Once, in the first run: a resumed build would repeat them in its log.
    if not counter.shards_done and counter.rejects_before:
        for reject in read_rejects(plan.folder / "plan-rejects.parquet"):
            rejected = ImageRejected(shard=None, key=reject.key, reason=reject.reason, detail=reject.detail)
            counter.watcher.see(rejected)
