"""A build as names and numbers, so that any process can begin to work on it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from ferkd_data.builder.labelling.forwards import Forwards, Nobody, Observer, current_device, open_staging
from ferkd_data.builder.labelling.label_shard import Tools
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.errors import TeacherError
from ferkd_data.images import ClassList, ImageSource, open_source
from ferkd_data.labels.buckets import QuantileThresholds, Thresholds
from ferkd_data.teachers import Teacher, TeacherSpec, load_teachers
from ferkd_data.teachers.compiled import compile_teachers


@dataclass(frozen=True, kw_only=True)
class Job:
    source: str
    classes: ClassList | None
    out: Path | str
    """A folder, or the URL of a store."""
    teachers: tuple[TeacherSpec, ...]
    precision: str
    settings: BuildSettings
    batch_size: int
    workers: int
    """Threads that decode and cut, in each process."""
    threads: int
    """Threads that compute, in each process."""
    compile: bool = False
    """Compile the teachers, in each process."""
    teacher_timeout: float | None = None
    """Seconds a worker may wait for a teacher before the driver ends it."""
    fail_on_reject: bool = False
    digests: tuple[str, ...] = ()
    """Digests of the teachers that the driver loaded; each worker's own must have the same."""

    @property
    def name(self) -> str:
        """Short, for people."""
        return PurePosixPath(self.out).name

    def open_source(self) -> ImageSource:
        return open_source(self.source, classes=self.classes)


@contextmanager
def open_tools(
    job: Job, device: str, teachers: Sequence[Teacher] | None = None, observer: Observer | None = None
) -> Iterator[Tools]:
    """Open the tools of this process for labelling shards, with `teachers` where it has loaded them already.

    Compiles the teachers if the job asks for it.
    """
    with (
        current_device(device),
        ThreadPoolExecutor(job.workers, thread_name_prefix="ferkd-data", initializer=_compute_alone) as executor,
    ):
        loaded = teachers or _load_teachers(job, device)
        # This thread keeps the number it has: it would take that of the pool if it had not asked for its own before.
        torch.get_num_threads()
        if job.compile:
            loaded = compile_teachers(loaded, job.batch_size)
        yield Tools(
            source=job.open_source(),
            teachers=loaded,
            settings=job.settings,
            thresholds=stored_thresholds(job.settings),
            device=device,
            staging=open_staging(device),
            batch_size=job.batch_size,
            workers=job.workers,
            executor=executor,
            forwards=Forwards(observer=observer or Nobody()),
            fail_on_reject=job.fail_on_reject,
        )


def _load_teachers(job: Job, device: str) -> list[Teacher]:
    """Raises TeacherError where a teacher is not the one that the driver loaded."""
    with same_working_folder():
        loaded = load_teachers(job.teachers, device=device, precision=job.precision)
    for teacher, digest in zip(loaded, job.digests, strict=False):
        if teacher.digest != digest:
            raise TeacherError(
                f"teacher {teacher.spec}: is another model in this worker than in the process that began the build "
                f"(digest {teacher.digest[:12]}, not {digest[:12]}); are its weights random, or its files changing? "
                "Load them from a file, or set the seed in its factory"
            )
    return loaded


@contextmanager
def same_working_folder() -> Iterator[None]:
    """Go back to it at the end: a teacher's module may change it, and relative paths would mean something else."""
    folder = Path.cwd()
    try:
        yield
    finally:
        os.chdir(folder)


def _compute_alone() -> None:
    """One of several threads that decode and cut: PyTorch's own wait by spinning, on the others' cores."""
    torch.set_num_threads(1)


def stored_thresholds(settings: BuildSettings) -> Thresholds:
    """The thresholds of the settings, or a stand-in until the quantiles are known."""
    asked = settings.thresholds
    if isinstance(asked, QuantileThresholds):
        return Thresholds(low=0, mid=0, top=1, confidence=asked.confidence)
    return asked
