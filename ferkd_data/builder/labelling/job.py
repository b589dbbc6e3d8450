"""`Job`: a build as names and numbers, which any process can open. `Tools`: the job opened in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch

from ferkd_data.builder.labelling.forwards import (
    Forwards,
    NullObserver,
    Observer,
    Staging,
    current_device,
    open_staging,
)
from ferkd_data.builder.settings import BuildSettings, WorkerResources
from ferkd_data.errors import TeacherError
from ferkd_data.images import ClassList, ImageSource, open_source
from ferkd_data.labels.buckets import QuantileThresholds, Thresholds
from ferkd_data.teachers import Teacher, TeacherSpec, load_teachers
from ferkd_data.teachers.compiled import compile_teachers


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker needs to know of a build. It can be pickled and sent to another machine."""

    source: str
    classes: ClassList | None
    out: Path | str | None
    """A folder, or the URL of a store; None where nothing is written, as in a dry run."""
    teachers: tuple[TeacherSpec, ...]
    precision: str
    settings: BuildSettings
    resources: WorkerResources
    fail_on_reject: bool = False
    digests: tuple[str, ...] = ()
    """Digests of the teachers that the driver loaded; each worker's own must have the same."""

    @property
    def name(self) -> str:
        """Last component of OUT, for messages."""
        return "dry run" if self.out is None else PurePosixPath(self.out).name

    @property
    def thresholds(self) -> Thresholds:
        """Thresholds of the buckets that are stored: provisional ones during the build where they are quantiles."""
        asked = self.settings.thresholds
        if isinstance(asked, QuantileThresholds):
            # Quantiles are known only once every crop is labelled. Until then nearly all crops count as hard_positive.
            return Thresholds(low=0, mid=0, top=1, confidence=asked.confidence)
        return asked

    def open_source(self) -> ImageSource:
        return open_source(self.source, classes=self.classes)


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The means to label shards in one process. Opened once, used by its labelling thread for all its shards."""

    job: Job
    device: str
    source: ImageSource
    teachers: Sequence[Teacher]
    staging: Staging
    """Kept for all shards: on a GPU, a new stream would get memory of its own."""
    executor: Executor
    """Threads that decode and cut."""
    forwards: Forwards = field(default_factory=Forwards)


@contextmanager
def open_tools(
    job: Job, device: str, teachers: Sequence[Teacher] | None = None, observer: Observer | None = None
) -> Iterator[Tools]:
    """Open the source, the threads and, unless `teachers` are given, the teachers of this process.

    Compiles the teachers if the job asks for it. Raises TeacherError, SourceError.
    """
    with current_device(device), _open_executor(job.resources.threads, device) as executor:
        # The driver's own teachers where it labels by itself.
        loaded = teachers or _load_teachers(job, device)
        # PyTorch's number of threads is per thread, but a thread that never asked takes the newest number set by any.
        # Asking here keeps this thread's number when the threads above set theirs to 1.
        torch.get_num_threads()
        if job.resources.compile:
            loaded = compile_teachers(loaded, job.resources.batch_size)
        yield Tools(
            job=job,
            device=device,
            source=job.open_source(),
            teachers=loaded,
            staging=open_staging(device),
            executor=executor,
            forwards=Forwards(observer=observer or NullObserver()),
        )


def _load_teachers(job: Job, device: str) -> list[Teacher]:
    """Load this process's teachers. Raises TeacherError for one that is not the one that the driver loaded."""
    with same_working_folder():
        loaded = load_teachers(job.teachers, device=device, precision=job.precision)
    # A job has no digests where nobody has loaded its teachers before: then there is nothing to compare with.
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
    """Return to the working folder at the end: a teacher's module may change it, and with it all relative paths."""
    folder = Path.cwd()
    try:
        yield
    finally:
        os.chdir(folder)


def _open_executor(threads: int, device: str) -> ThreadPoolExecutor:
    """Open the threads that decode and cut. Called where `device` is the current one."""
    # As a number: `cuda` alone means the GPU that is current in this thread, and in a new one that is the first.
    gpu = None if device == "cpu" else torch.cuda.current_device()
    return ThreadPoolExecutor(threads, thread_name_prefix="ferkd-data", initializer=_set_up_thread, initargs=(gpu,))


def _set_up_thread(gpu: int | None) -> None:
    """Set up a thread that decodes and cuts, on the GPU of the teachers."""
    # PyTorch's own threads would wait by spinning, on the cores of the other threads.
    torch.set_num_threads(1)
    if gpu is not None:
        # Otherwise whatever names no GPU, pinned memory for one, would open the first GPU too and take memory there.
        torch.cuda.set_device(gpu)
