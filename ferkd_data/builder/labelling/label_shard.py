"""The loop of a build: one image shard from encoded images to finished rows.

Legend: B crops of a batch, C classes, N crops per image, k kept classes, T teachers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ferkd_data.builder.labelling.counts import TeacherCounts, count_batch
from ferkd_data.builder.labelling.crop_batches import CropBatch, DecodedImage, Rejected, View, crop_batches
from ferkd_data.builder.labelling.forwards import Fetched, Forwards, Staging
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.errors import BuildError
from ferkd_data.images import ImageRef, ImageSource
from ferkd_data.labels.buckets import Thresholds, assign_buckets, confidence
from ferkd_data.labels.ensemble import check_logits, combine, raise_if_wrong
from ferkd_data.labels.rows import NO_OPERATIONS, DeviceLabels, ImageLabels, SoftLabels, soft_labels
from ferkd_data.teachers import Teacher


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What every shard of a build is worked on with."""

    source: ImageSource
    teachers: Sequence[Teacher]
    settings: BuildSettings
    thresholds: Thresholds
    """Those that buckets are stored for; with quantile thresholds, provisional."""
    device: str
    staging: Staging
    """One for all shards: on a GPU its streams keep the memory that they once had."""
    batch_size: int
    workers: int
    executor: Executor
    forwards: Forwards = field(default_factory=Forwards)
    fail_on_reject: bool = False
    first_crop: int = 0
    """0, or the number of crops that an extended label set has already."""


ASKED_AHEAD = 2
"""Batches that a device has to do while the host deals with the answers of the one before."""

OnBatch = Callable[[int, int], None]
"""Called with the crops just labelled and the images rejected so far in this shard."""


def label_shard(
    refs: Sequence[ImageRef], tools: Tools, rejected: Rejected, counts: TeacherCounts, on_batch: OnBatch
) -> Iterator[tuple[ImageLabels, bytes]]:
    """Rows of a shard with their encoded images, in the order of `refs`; rejects and counts are added to.

    Raises TeacherError when a teacher says something impossible, BuildError for a reject where those are fatal.
    """
    batches = crop_batches(
        refs,
        tools.source.read(refs),
        settings=tools.settings,
        first_crop=tools.first_crop,
        views=list(dict.fromkeys(view_of(teacher) for teacher in tools.teachers)),
        staging=tools.staging,
        batch_size=tools.batch_size,
        executor=tools.executor,
        workers=tools.workers,
        rejected=rejected,
    )
    for image, labels in _by_image(_labelled(batches, tools, rejected, counts, on_batch)):
        yield _row(image, labels, tools.thresholds), image.data


def view_of(teacher: Teacher) -> View:
    return View(teacher.preprocessing.size, teacher.preprocessing.interpolation)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answer:
    """A batch's results while the device may still be computing them."""

    labels: DeviceLabels
    fetched: Fetched
    """On the host: the three tensors of `labels`; whether each teacher is wrong (T,); the sums of `count_batch`."""


def _labelled(
    batches: Iterable[CropBatch], tools: Tools, rejected: Rejected, counts: TeacherCounts, on_batch: OnBatch
) -> Iterator[tuple[CropBatch, SoftLabels]]:
    """Ask the next batch before the last one's answer is waited for, so that a GPU never idles."""
    asked: deque[tuple[CropBatch, _Answer]] = deque()
    for batch in batches:
        asked.append((batch, _ask(batch, tools)))
        _fail_on_reject(tools, rejected)
        if len(asked) > ASKED_AHEAD:
            yield _receive(*asked.popleft(), tools, rejected, counts, on_batch)
    _fail_on_reject(tools, rejected)
    while asked:
        yield _receive(*asked.popleft(), tools, rejected, counts, on_batch)


@torch.inference_mode()
def _ask(batch: CropBatch, tools: Tools) -> _Answer:
    tools.staging.join(batch.cut, list(batch.views.values()))
    logits_TBC = [tools.forwards.logits(teacher, batch.views[view_of(teacher)]) for teacher in tools.teachers]
    target = tools.staging.upload(batch.targets)
    prob_BC = combine(
        logits_TBC,
        weights=[teacher.spec.weight for teacher in tools.teachers],
        temperatures=[teacher.spec.temperature for teacher in tools.teachers],
        mode=tools.settings.ensemble,
    )
    tools.forwards.observer.answered()
    labels = soft_labels(prob_BC, target, top_k=tools.settings.top_k)
    wrong = [
        check_logits(logits, teacher.spec.temperature)
        for logits, teacher in zip(logits_TBC, tools.teachers, strict=True)
    ]
    counted = count_batch(logits_TBC, [teacher.spec.temperature for teacher in tools.teachers], target)
    results = [labels.class_index, labels.class_prob, labels.target_prob, torch.stack(wrong), *counted]
    return _Answer(labels=labels, fetched=tools.staging.fetch(results))


def _receive(
    batch: CropBatch,
    answer: _Answer,
    tools: Tools,
    rejected: Rejected,
    counts: TeacherCounts,
    on_batch: OnBatch,
) -> tuple[CropBatch, SoftLabels]:
    # A GPU is asked without waiting, so a teacher that hangs there is waited for here.
    tools.forwards.observer.asking(", ".join(str(teacher.spec) for teacher in tools.teachers))
    try:
        answer.fetched.wait()
    except RuntimeError as error:
        # Whatever went wrong there, a teacher's operator or the hardware, is heard of at the next wait.
        raise BuildError(
            f"device {tools.device} failed while it ran the teachers ({str(error).splitlines()[0]}); its process "
            "cannot go on. Finished shards stay: run the same command again"
        ) from error
    class_index, class_prob, target_prob, wrong_T, *counted = answer.fetched.tensors
    for wrong, teacher in zip(wrong_T, tools.teachers, strict=True):
        raise_if_wrong(wrong, str(teacher.spec))
    counts.add(counted)
    tools.forwards.observer.answered()
    on_batch(len(batch.targets), len(rejected.items))
    labels = replace(answer.labels, class_index=class_index, class_prob=class_prob, target_prob=target_prob)
    return batch, labels.to_numpy()


def _by_image(
    labelled: Iterable[tuple[CropBatch, SoftLabels]],
) -> Iterator[tuple[DecodedImage, list[SoftLabels]]]:
    """Put the pieces of an image, which may lie in several batches, together again."""
    pieces: list[SoftLabels] = []
    for batch, labels in labelled:
        row = 0
        for image, start, stop in batch.slices:
            rows = slice(row, row + stop - start)
            row = rows.stop
            pieces.append(
                SoftLabels(
                    class_index=labels.class_index[rows],
                    class_prob=labels.class_prob[rows],
                    target_prob=labels.target_prob[rows],
                )
            )
            if stop == len(image.crops):
                yield image, pieces
                pieces = []


def _row(image: DecodedImage, pieces: list[SoftLabels], thresholds: Thresholds) -> ImageLabels:
    class_prob = np.concatenate([piece.class_prob for piece in pieces])
    target_prob = np.concatenate([piece.target_prob for piece in pieces])
    height, width = image.pixels.shape[:2]
    return ImageLabels(
        key=image.ref.key,
        image_digest=image.digest,
        height=height,
        width=width,
        target=image.target,
        boxes=image.crops.boxes,
        flip=image.crops.flip,
        class_index=np.concatenate([piece.class_index for piece in pieces]),
        class_prob=class_prob,
        target_prob=target_prob,
        bucket=assign_buckets(confidence(class_prob, target_prob, thresholds.confidence), thresholds),
        operations=NO_OPERATIONS if image.crops.operations is None else image.crops.operations,
    )


def _fail_on_reject(tools: Tools, rejected: Rejected) -> None:
    if tools.fail_on_reject and rejected.items:
        first = rejected.items[0]
        raise BuildError(
            f"image {first.key!r} cannot be used ({first.reason}: {first.detail}); repair or remove it and run the "
            "same command again, or let rejects be collected with --on-error reject"
        )
