"""How fast a build's workers label: timed on a few batches, with all of them at work at once.

Workers share what a machine has, and several may share a GPU: one measured alone would promise too much for the others.

How fast a worker of a Ray cluster labels: measured where Ray finds room, with what a worker of a build gets.
"""

from __future__ import annotations

import contextlib
import itertools
import platform
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import torch

import ferkd_data
from ferkd_data.builder.job import Job, open_tools
from ferkd_data.builder.labelling.counts import TeacherCounts
from ferkd_data.builder.labelling.crop_batches import Rejected
from ferkd_data.builder.labelling.label_shard import Tools, label_shard, view_of
from ferkd_data.builder.workers.labeller import failed
from ferkd_data.builder.workers.messages import Failed, WorkerLostError
from ferkd_data.builder.workers.pool import failure
from ferkd_data.builder.workers.processes import WorkerProcess, WorkerProcesses, start_process
from ferkd_data.builder.workers.ray_actors import PATIENCE_SECONDS, join_driver, last_line
from ferkd_data.builder.workers.ray_cluster import Fleet, log
from ferkd_data.errors import BuildError
from ferkd_data.format.writers import Row, write_shard
from ferkd_data.images import ImageRef
from ferkd_data.replay import empty_batch
from ferkd_data.scratch import Scratch
from ferkd_data.teachers import Teacher

MEASURE_SECONDS = 15.0
"""How long the whole pipeline is timed."""
TEACHER_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one worker did."""

    place: str
    images: int
    crops: int
    crops_per_second: float
    label_bytes: int
    image_bytes: int
    """Copied into the shard; 0 for layout parquet."""
    teacher_milliseconds: tuple[float, ...]
    """Of each teacher, for one crop."""


def measure(tools: Tools, refs: Sequence[ImageRef]) -> Sample:
    """Label images of a shard for about MEASURE_SECONDS, and write them to a temporary folder."""
    settings = tools.settings
    milliseconds = [_teacher_milliseconds(teacher, tools) for teacher in tools.teachers]
    rows, rate = _label(refs, tools)
    copied = sum(len(image) for _, image in rows) if settings.layout == "webdataset" else 0
    written = 0
    if rows:
        with Scratch("dry-run") as folder:
            _, files = write_shard(folder, 0, rows, layout=settings.layout, block_starts=settings.block_starts)
            written = sum(file.bytes for file in files)
    return Sample(
        place=tools.device,
        images=len(rows),
        crops=len(rows) * settings.crops,
        crops_per_second=rate,
        label_bytes=written - copied,
        image_bytes=copied,
        teacher_milliseconds=tuple(milliseconds),
    )


def measure_as_worker(job: Job, device: str, refs: Sequence[ImageRef]) -> Sample:
    """With teachers and threads of its own, as a worker of a build in this process."""
    torch.set_num_threads(job.threads)
    with open_tools(job, device) as tools:
        return measure(tools, refs)


def measure_together(job: Job, devices: Sequence[str], shards: Sequence[Sequence[ImageRef]]) -> list[Sample]:
    """A worker process on each device, as a build has them, each with images of its own.

    Raises what a worker raised, BuildError for one that died.
    """
    with ExitStack() as stack:
        workers = []
        for number, (device, refs) in enumerate(zip(devices, shards, strict=True)):
            workers.append(start_process(number, device, _work, job, refs))
            stack.callback(workers[-1].end, 0)
        return [_hear(worker) for worker in workers]


def _work(driver: Connection, job: Job, device: str, refs: Sequence[ImageRef]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends this process
    answer: Sample | Failed
    try:
        answer = measure_as_worker(job, device, refs)
    except Exception as error:
        answer = failed(error)
    with contextlib.suppress(OSError):
        driver.send(answer)


def _hear(worker: WorkerProcess) -> Sample:
    try:
        answer = cast(Sample | Failed, worker.hear())
    except WorkerLostError as error:
        hint = WorkerProcesses.when_none_gets_ready
        raise BuildError(f"{worker} {error} while it was measured; {hint}") from error
    if isinstance(answer, Failed):
        raise failure(answer, str(worker))
    return answer


def _label(refs: Sequence[ImageRef], tools: Tools) -> tuple[list[Row], float]:
    """Rows, and crops per second; the first batch warms up and is not counted."""
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


def _teacher_milliseconds(teacher: Teacher, tools: Tools) -> float:
    view = view_of(teacher)
    batch = empty_batch(tools.batch_size, view.size).random_(0, 256).to(tools.device)
    tools.forwards.logits(teacher, batch).cpu()
    times = []
    for _ in itertools.repeat(None, TEACHER_BATCHES):
        started = time.perf_counter()
        tools.forwards.logits(teacher, batch).cpu()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2] * 1000 / tools.batch_size


def measure_on_ray(job: Job, fleet: Fleet, shards: Sequence[Sequence[ImageRef]]) -> list[Sample]:
    """One worker for the images of each shard, at once. Raises what a worker raised, BuildError for one that died."""
    ray = fleet.ray
    # A process of its own for each call: its teachers go with it.
    work = ray.remote(num_cpus=fleet.cpus, num_gpus=fleet.gpus, max_calls=1, max_retries=0)(_work_on_ray)
    calls = [work.remote(job, fleet.device, refs, str(Path.cwd()), ferkd_data.__version__) for refs in shards]
    _, missing = ray.wait(calls, num_returns=len(calls), timeout=PATIENCE_SECONDS)
    if missing:
        log.warning("Ray still measures, or waits for a place: a worker asks for %s; see `ray status`", fleet)
    try:
        answers: list[Sample | Failed] = ray.get(calls)
    except ray.exceptions.RayError as error:
        how = f"{type(error).__name__}: {last_line(error)}"
        raise BuildError(f"a worker was lost while it was measured ({how})") from error
    return [_sample(answer) for answer in answers]


def _sample(answer: Sample | Failed) -> Sample:
    if isinstance(answer, Failed):
        raise failure(answer, "a worker that was measured")
    return answer


def _work_on_ray(
    job: Job, device: str, refs: Sequence[ImageRef], driver_folder: str, driver_version: str
) -> Sample | Failed:
    """Runs in a process that Ray starts on some node."""
    try:
        join_driver(driver_folder, driver_version)
        return replace(measure_as_worker(job, device, refs), place=f"{device} of node {platform.node()}")
    except Exception as error:
        return failed(error)
