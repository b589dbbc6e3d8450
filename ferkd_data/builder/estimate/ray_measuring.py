"""How fast a worker of a Ray cluster labels: measured where Ray finds room, with what a worker of a build gets."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ferkd_data
from ferkd_data.builder.estimate.measuring import Sample, measure_as_worker
from ferkd_data.builder.job import Job
from ferkd_data.builder.workers.failures import failure
from ferkd_data.builder.workers.labeller import failed
from ferkd_data.builder.workers.messages import Failed
from ferkd_data.builder.workers.ray_actors import PATIENCE_SECONDS, join_driver, last_line
from ferkd_data.builder.workers.ray_cluster import Fleet, log
from ferkd_data.errors import BuildError
from ferkd_data.images import ImageRef


def measure_on_ray(job: Job, fleet: Fleet, shards: Sequence[Sequence[ImageRef]]) -> list[Sample]:
    """One worker for the images of each shard, at once. Raises what a worker raised, BuildError for one that died."""
    ray = fleet.ray
    # A process of its own for each call: its teachers go with it.
    work = ray.remote(num_cpus=fleet.cpus, num_gpus=fleet.gpus, max_calls=1, max_retries=0)(_work)
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


def _work(job: Job, device: str, refs: Sequence[ImageRef], driver_folder: str, driver_version: str) -> Sample | Failed:
    """Runs in a process that Ray starts on some node."""
    try:
        join_driver(driver_folder, driver_version)
        return replace(measure_as_worker(job, device, refs), place=f"{device} of node {platform.node()}")
    except Exception as error:
        return failed(error)
