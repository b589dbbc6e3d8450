"""Which engine labels the shards, and what it reports to."""

from __future__ import annotations

from collections.abc import Sequence

from ferkd_data.builder.crew import Crew
from ferkd_data.builder.job import open_tools
from ferkd_data.builder.local import label_here
from ferkd_data.builder.plan import Plan
from ferkd_data.builder.prepare import Prepared
from ferkd_data.builder.progress import OnProgress, ProgressCounter
from ferkd_data.builder.state import BuildFolder
from ferkd_data.builder.stop import Stop


def label_shards(
    prepared: Prepared, folder: BuildFolder, plan: Plan, shards: Sequence[int], on_progress: OnProgress, stop: Stop
) -> None:
    """Label each of `shards` that has no record yet."""
    job, devices = prepared.job, prepared.devices
    all_of_them = len(shards) == plan.summary.shards
    counter = ProgressCounter(
        report=on_progress,
        crops_per_image=job.settings.crops - job.first_crop,
        shards_total=len(shards),
        images_total=plan.summary.images if all_of_them else plan.count_images(shards),
        rejects_before=plan.summary.rejects if all_of_them else 0,
    )
    todo = []
    for shard in shards:
        record = folder.record(shard)
        if record is None:
            todo.append(shard)
        else:
            counter.shard_done(shard, record.rows + len(record.rejects), len(record.rejects))
    if len(devices) == 1 and job.teacher_timeout is None:
        with stop.labelling(), open_tools(job, devices[0], prepared.ensemble) as tools:
            label_here(folder, plan, tools, todo, counter, stop)
        return
    with stop.labelling(), Crew(job, devices, counter, stop) as crew:
        crew.label(todo)
