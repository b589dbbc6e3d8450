"""The engine of one process: the shards one after the other.

Which engine labels the shards, and what it reports to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ferkd_data.builder.job import open_tools
from ferkd_data.builder.labelling.forwards import Nobody
from ferkd_data.builder.labelling.label_shard import Tools
from ferkd_data.builder.labelling.write_behind import WriteBehind
from ferkd_data.builder.overview import overview_of
from ferkd_data.builder.plan import Plan
from ferkd_data.builder.prepare import Prepared
from ferkd_data.builder.state import BuildFolder
from ferkd_data.builder.stop import Stop
from ferkd_data.builder.watch.events import BuildStarted, ImageRejected, Watcher
from ferkd_data.builder.watch.progress import ProgressCounter
from ferkd_data.builder.workers.messages import Workers
from ferkd_data.builder.workers.pool import Crew
from ferkd_data.builder.workers.processes import WorkerProcesses
from ferkd_data.builder.workers.ray_actors import RayWorkers
from ferkd_data.format.rejects import read_rejects


def label_here(
    folder: BuildFolder, plan: Plan, tools: Tools, shards: Sequence[int], counter: ProgressCounter, stop: Stop
) -> None:
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


class Reporting(Nobody):
    """Passes on what the teachers of this process are at, as far as anybody wants to know."""

    def __init__(self, counter: ProgressCounter) -> None:
        self.counter = counter

    def halved(self, teacher: str, crops: int) -> None:
        self.counter.halved(teacher, crops)


def label_shards(
    prepared: Prepared, folder: BuildFolder, plan: Plan, shards: Sequence[int], watcher: Watcher, stop: Stop
) -> None:
    """Label each of `shards` that has no record yet."""
    job, devices, fleet = prepared.job, prepared.workplace.devices, prepared.workplace.fleet
    counter = _counter(prepared, plan, shards, watcher)
    todo = []
    for shard, record in folder.records(shards):
        if record is None:
            todo.append(shard)
        else:
            counter.shard_found(record)
    _tell_of_start(prepared, plan, counter)
    watcher.see(overview_of(prepared, plan, todo))
    with stop.labelling():
        if fleet is None and len(devices) == 1 and job.teacher_timeout is None:
            with open_tools(job, devices[0], prepared.ensemble, Reporting(counter)) as tools:
                label_here(folder, plan, tools, todo, counter, stop)
            return
        prepared.let_teachers_go()
        workers: Workers[Any] = WorkerProcesses(job, devices) if fleet is None else RayWorkers(job, fleet)
        with Crew(workers, folder, counter, stop, job.teacher_timeout) as crew:
            crew.label(todo)


def _counter(prepared: Prepared, plan: Plan, shards: Sequence[int], watcher: Watcher) -> ProgressCounter:
    crops = prepared.job.settings.crops
    images = plan.shard_images(shards)
    return ProgressCounter(
        watcher=watcher,
        crops_of=lambda shard: crops - plan.first_crop(shard),
        shards_total=len(shards),
        images_total=sum(images),
        crops_total=sum(n * (crops - plan.first_crop(shard)) for shard, n in zip(shards, images, strict=True)),
        num_teachers=len(prepared.ensemble),
        rejects_before=plan.summary.rejects if len(shards) == len(plan.shards) else 0,
    )


def _tell_of_start(prepared: Prepared, plan: Plan, counter: ProgressCounter) -> None:
    job = prepared.job
    crops = counter.crops_total - counter.crops_found
    started = BuildStarted(
        out=str(job.out),
        source=job.source,
        teachers=tuple(map(str, job.teachers)),
        settings=asdict(job.settings),
        devices=tuple(prepared.workplace.devices),
        extends=prepared.base is not None,
        shards=counter.shards_total,
        shards_done=counter.shards_done,
        images=counter.images_total,
        crops=crops,
        forwards=crops * counter.num_teachers,
    )
    counter.watcher.see(started)
    if not counter.shards_done and counter.rejects_before:
        for reject in read_rejects(plan.folder / "plan-rejects.parquet"):
            rejected = ImageRejected(shard=None, key=reject.key, reason=reject.reason, detail=reject.detail)
            counter.watcher.see(rejected)
