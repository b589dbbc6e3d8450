"""How fast a worker of a Ray cluster labels: measured where Ray finds room, with what a worker of a build gets."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import ferkd_data
from ferkd_data.builder.failures import failure
from ferkd_data.builder.job import Job
from ferkd_data.builder.label_shard import Tools
from ferkd_data.builder.measuring import Sample, attempt, measure
from ferkd_data.builder.messages import Failed
from ferkd_data.builder.ray_cluster import Fleet, log
from ferkd_data.builder.ray_worker import Labeller
from ferkd_data.builder.state import FOLDER
from ferkd_data.errors import BuildError
from ferkd_data.images import ImageRef

PATIENCE_SECONDS = 90.0
"""Before the user is told what the measurement waits for."""


def measure_on_ray(job: Job, fleet: Fleet, shards: Sequence[Sequence[ImageRef]]) -> list[Sample]:
    """One worker for the images of each shard, at once. Raises what a worker raised, BuildError for one that died."""
    ray = fleet.ray
    remote = ray.remote(num_cpus=fleet.cpus, num_gpus=fleet.gpus, max_calls=1, max_retries=0)(_work)
    calls = [remote.remote(job, fleet.device, refs, str(Path.cwd()), ferkd_data.__version__) for refs in shards]
    _, waited_for = ray.wait(calls, num_returns=len(calls), timeout=PATIENCE_SECONDS)
    if waited_for:
        log.warning("Ray still measures, or waits for a place: a worker asks for %s; see `ray status`", fleet)
    try:
        answers: list[Sample | Failed] = ray.get(calls)
    except ray.exceptions.RayError as error:
        last_line = str(error).strip().rpartition("\n")[2]
        raise BuildError(f"a worker on Ray died while it was measured ({type(error).__name__}): {last_line}") from error
    return [_sample(answer) for answer in answers]


def _sample(answer: Sample | Failed) -> Sample:
    if isinstance(answer, Failed):
        raise failure(answer, "a worker on Ray")
    return answer


def _work(job: Job, device: str, refs: Sequence[ImageRef], driver_folder: str, driver_version: str) -> Sample | Failed:
    """Opened as a worker of a build is, with an OUT of its own: the driver has made none."""

    def action() -> Sample | Failed:
        with tempfile.TemporaryDirectory(prefix="ferkd-data-dry-run-") as name:
            (Path(name) / FOLDER).mkdir()
            mine = replace(job, out=Path(name))
            worker = Labeller(mine, device, driver_folder=driver_folder, driver_version=driver_version)
            answer = worker.open()
            if isinstance(answer, Failed):
                return answer
            # In its thread, whose number of threads to compute with is that of a build.
            sample = worker.thread.submit(measure, cast(Tools, worker.tools), refs).result()
            return replace(sample, place=f"{device} of node {platform.node()}")

    return attempt(action)
