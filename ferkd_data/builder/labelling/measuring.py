"""Time how fast this process labels: a few seconds of the ordinary loop, and each teacher by itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ferkd_data.builder.labelling.crop_batches import input_of
from ferkd_data.builder.labelling.job import Tools
from ferkd_data.builder.labelling.label_shard import label_shard
from ferkd_data.format.manifest import Layout
from ferkd_data.format.writers import Row, write_shard
from ferkd_data.images import ImageRef, Reject
from ferkd_data.replay import empty_batch
from ferkd_data.scratch import Scratch
from ferkd_data.teachers import Teacher

MEASURE_SECONDS = 15.0
"""Time that the whole loop is measured for."""
TEACHER_BATCHES = 3
TEACHER_SECONDS = 1.0
"""Each teacher is measured for this long, and for TEACHER_BATCHES at least: ONNX Runtime's first batches are slow."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The work of one worker in a few seconds."""

    location: str
    """The worker's device, and its node on a cluster."""
    images: int
    crops: int
    crops_per_second: float
    label_bytes: int
    """Bytes that the measured images take in label files, without those that any file takes."""
    image_bytes: int
    """Bytes copied into the shard; 0 for layout parquet."""
    teacher_milliseconds: tuple[float, ...]
    """Milliseconds of each teacher for one crop."""
    file_bytes: int = 0
    """Bytes that a label file takes however few its rows are; 0 for layout webdataset."""


def measure(tools: Tools, refs: Sequence[ImageRef], location: str) -> Sample:
    """Label images for about MEASURE_SECONDS, at least one, and write them to a temporary folder.

    Raises what `label_shard` raises.
    """
    settings = tools.job.settings
    # Before the loop, which then finds the teachers warm: the first batches of a network are slow.
    milliseconds = [_teacher_milliseconds(teacher, tools) for teacher in tools.teachers]
    rows, rate = _label(refs, tools)
    copied = sum(len(image) for _, image in rows) if settings.layout == "webdataset" else 0
    starts = list(settings.block_starts)
    written = _written(rows, starts, settings.layout)
    per_file = 0
    # A few images make small files, most of which is footer: scaled up, it would make many times the real size. The
    # same rows in twice as many files tell what a file takes.
    halves = sorted({*starts, *((a + b) // 2 for a, b in zip(starts, [*starts[1:], settings.crops], strict=True))})
    if settings.layout == "parquet" and len(halves) > len(starts):
        per_file = max(0, _written(rows, halves, settings.layout) - written) // (len(halves) - len(starts))
        # All rows are counted in each file, so at most what was written is the files' own.
        per_file = min(per_file, written // len(starts))
    return Sample(
        location=location,
        images=len(rows),
        crops=len(rows) * settings.crops,
        crops_per_second=rate,
        label_bytes=written - copied - per_file * len(starts),
        image_bytes=copied,
        teacher_milliseconds=tuple(milliseconds),
        file_bytes=per_file,
    )


def _written(rows: Sequence[Row], starts: Sequence[int], layout: Layout) -> int:
    """Return the bytes of these rows by the build's own writer: how well labels compress depends on the teachers."""
    if not rows:
        return 0
    with Scratch("dry-run") as folder:
        _, files = write_shard(folder, 0, rows, layout=layout, block_starts=starts)
        return sum(file.bytes for file in files)


def _label(refs: Sequence[ImageRef], tools: Tools) -> tuple[list[Row], float]:
    """Return rows, and crops per second. The first batch warms up and is not counted where there is a second one."""
    marks: list[tuple[float, int]] = []
    rows: list[Row] = []
    started = time.perf_counter()
    for item in label_shard(refs, tools):
        if isinstance(item, Reject):
            continue
        marks.append((time.perf_counter(), item.crops))
        rows += item.rows
        # Only after a batch that completes an image: without a row there would be no size of labels.
        if item.rows and marks[-1][0] - started > MEASURE_SECONDS:
            break
    if len(marks) < 2:
        return rows, sum(crops for _, crops in marks) / max(time.perf_counter() - started, 1e-9)
    return rows, sum(crops for _, crops in marks[1:]) / (marks[-1][0] - marks[0][0])


def _teacher_milliseconds(teacher: Teacher, tools: Tools) -> float:
    """Return the median time of a batch by its number of crops; the first batch warms up."""
    size = tools.job.resources.batch_size
    batch = empty_batch(size, input_of(teacher).size).random_(0, 256).to(tools.device)
    # `.cpu()` waits for the device, here and below: else only the launch of its kernels would be timed.
    tools.forwards.logits(teacher, batch).cpu()
    times: list[float] = []
    while len(times) < TEACHER_BATCHES or sum(times) < TEACHER_SECONDS:
        started = time.perf_counter()
        tools.forwards.logits(teacher, batch).cpu()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2] * 1000 / size
