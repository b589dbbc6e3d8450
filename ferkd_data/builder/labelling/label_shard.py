"""The loop of a build: one image shard from encoded images to finished rows.

Crops go to the teachers batch by batch. The answers to a batch are fetched while the next batches are computed, split
by image, and yielded as rows with the bucket of each crop.

Legend: B crops of a batch, C classes, N crops per image, k kept classes, T teachers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ferkd_data.builder.labelling.crop_batches import CropBatch, DecodedImage, crop_batches, input_of
from ferkd_data.builder.labelling.forwards import Fetched
from ferkd_data.builder.labelling.job import Tools
from ferkd_data.builder.plan import unusable
from ferkd_data.errors import BuildError, FerkdError
from ferkd_data.format.writers import Row
from ferkd_data.images import ImageRef, Reject
from ferkd_data.labels.buckets import Thresholds, buckets_of
from ferkd_data.labels.rows import NO_OPERATIONS, UNKNOWN_TARGET, ImageLabels
from ferkd_data.labels.soft_labels import DeviceLabels, SoftLabels, check_logits, combine, raise_if_wrong, soft_labels
from ferkd_data.labels.statistics import P_MAX_UNITS, TEACHER_BINS
from ferkd_data.teachers.teacher import device_failed, is_out_of_memory, reason, refuse_failed_device

ASKED_AHEAD = 2
"""Batches that a device has to do while the host deals with the answers to the one before."""


@dataclass(frozen=True, eq=False)
class TeacherCounts:
    """Sums over the crops of a batch, or of all batches of a shard; integers, so that the order of adding is free."""

    agreement: Tensor
    """(T, T) int64: crops on which two teachers name the same class first."""
    right_together: Tensor
    """(T, T) int64: crops on which both name the ground truth; on the diagonal, each by itself."""
    reliability: Tensor
    """(3, T, TEACHER_BINS) int64, by the teacher's own p_max: crops with a ground truth; those that it names right; the
    sum of p_max in units of 1 / P_MAX_UNITS."""

    @classmethod
    def zeros(cls, num_teachers: int) -> TeacherCounts:
        square = (num_teachers, num_teachers)
        return cls(
            agreement=torch.zeros(square, dtype=torch.int64, device="cpu"),
            right_together=torch.zeros(square, dtype=torch.int64, device="cpu"),
            reliability=torch.zeros((3, num_teachers, TEACHER_BINS), dtype=torch.int64, device="cpu"),
        )

    def __add__(self, other: TeacherCounts) -> TeacherCounts:
        return TeacherCounts(
            agreement=self.agreement + other.agreement,
            right_together=self.right_together + other.right_together,
            reliability=self.reliability + other.reliability,
        )

    def statistics(self) -> dict[str, Any]:
        """Return the fields of `Statistics` that are counted by teacher."""
        crops, right, p_max = map(_as_tuples, self.reliability)
        return {
            "teacher_top1_matches_target": tuple(self.right_together.diagonal().tolist()),
            "teacher_agreement": _as_tuples(self.agreement),
            "teacher_right_together": _as_tuples(self.right_together),
            "teacher_bin_crops": crops,
            "teacher_bin_right": right,
            "teacher_bin_p_max": p_max,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledBatch:
    """A batch of crops whose answers have arrived."""

    crops: int
    rows: tuple[Row, ...]
    """Images whose last crop is in this batch; none where an image's crops go on in the next one."""
    counts: TeacherCounts


def label_shard(refs: Sequence[ImageRef], tools: Tools, first_crop: int = 0) -> Iterator[LabelledBatch | Reject]:
    """Label crops `first_crop` .. N - 1 of these images.

    Rows come in the order of `refs`, and so do rejects, which may come before rows of earlier images.

    Raises TeacherError for impossible answers, BuildError for a reject where the job makes these fatal and where memory
    runs out, DeviceFailedError.
    """
    try:
        yield from _labelled(refs, tools, first_crop)
    except FerkdError:
        raise
    except Exception as error:
        # Any operator may report a GPU's failure: of uploads, cutting and ranking as well as of the teachers.
        refuse_failed_device(tools.device, error)
        if is_out_of_memory(error):
            raise BuildError(
                f"device {tools.device} has too little memory for the crops and answers of a batch beside the teachers "
                f"({reason(error)}); end what else runs on it, or use a smaller --batch-size or fewer --workers"
            ) from error
        raise


def _labelled(refs: Sequence[ImageRef], tools: Tools, first_crop: int) -> Iterator[LabelledBatch | Reject]:
    unfinished: list[SoftLabels] = []  # the labels so far of the image whose crops go on in the next batch
    for item in _answered(crop_batches(refs, tools, first_crop), tools):
        if isinstance(item, Reject):
            yield item
            continue
        batch, labels, counts = item
        images, unfinished = _by_image(batch, labels, unfinished)
        rows = tuple((_image_labels(image, pieces, tools.job.thresholds), image.data) for image, pieces in images)
        yield LabelledBatch(crops=len(batch.targets), rows=rows, counts=counts)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answer:
    """The results of a batch, which the device may still be computing."""

    batch: CropBatch
    labels: DeviceLabels
    fetched: Fetched
    """On the host: the three tensors of `labels`; whether each teacher is wrong (T,); the sums of `count_batch`."""


def _answered(
    batches: Iterable[CropBatch | Reject], tools: Tools
) -> Iterator[tuple[CropBatch, SoftLabels, TeacherCounts] | Reject]:
    """Ask the teachers about the next batches before waiting for the answers to one, so that a GPU is never idle."""
    asked: deque[_Answer] = deque()
    for item in batches:
        if isinstance(item, Reject):
            if tools.job.fail_on_reject:
                raise unusable(item)
            yield item
            continue
        asked.append(_ask(item, tools))
        if len(asked) > ASKED_AHEAD:
            yield _receive(asked.popleft(), tools)
    while asked:
        yield _receive(asked.popleft(), tools)


@torch.inference_mode()
def _ask(batch: CropBatch, tools: Tools) -> _Answer:
    tools.staging.join(batch.cut, list(batch.pixels.values()))
    logits_TBC = [tools.forwards.logits(teacher, batch.pixels[input_of(teacher)]) for teacher in tools.teachers]
    temperatures = [teacher.spec.temperature for teacher in tools.teachers]
    target = tools.staging.upload(batch.targets)
    prob_BC = combine(
        logits_TBC,
        weights=[teacher.spec.weight for teacher in tools.teachers],
        temperatures=temperatures,
        mode=tools.job.settings.ensemble,
    )
    # On a CPU the teachers have answered. On a GPU they have only been asked: `_receive` waits for them.
    tools.forwards.observer.answered()
    labels = soft_labels(prob_BC, target, top_k=tools.job.settings.top_k)
    wrong = [check_logits(logits, t) for logits, t in zip(logits_TBC, temperatures, strict=True)]
    counted = count_batch(logits_TBC, temperatures, target)
    # One list, so that everything is fetched in one go and the host waits for the device once per batch.
    results = [labels.class_index, labels.class_prob, labels.target_prob, torch.stack(wrong), *counted]
    return _Answer(batch=batch, labels=labels, fetched=tools.staging.fetch(results))


def _receive(answer: _Answer, tools: Tools) -> tuple[CropBatch, SoftLabels, TeacherCounts]:
    # A GPU is asked without waiting, so a teacher that hangs there is waited for here.
    tools.forwards.observer.asking([teacher.spec for teacher in tools.teachers])
    try:
        answer.fetched.wait()
    except RuntimeError as error:
        # A GPU reports any failure, of a teacher's operator or of the hardware, at the next wait.
        raise device_failed(tools.device, error) from error
    class_index, class_prob, target_prob, wrong_T, *counted = answer.fetched.tensors
    for wrong, teacher in zip(wrong_T, tools.teachers, strict=True):
        raise_if_wrong(wrong, teacher.spec)
    tools.forwards.observer.answered()
    # The copies on the host in place of the device's tensors.
    labels = replace(answer.labels, class_index=class_index, class_prob=class_prob, target_prob=target_prob)
    return answer.batch, labels.to_numpy(), TeacherCounts(*counted)


def _by_image(
    batch: CropBatch, labels: SoftLabels, unfinished: Sequence[SoftLabels]
) -> tuple[list[tuple[DecodedImage, list[SoftLabels]]], list[SoftLabels]]:
    """Give each image that ends in this batch its labels, and return the labels of the one that does not end."""
    finished = []
    # Crops come image after image, so only the first image of a batch may have begun before, and only the last may go
    # on.
    pieces, row = list(unfinished), 0
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
            finished.append((image, pieces))
            pieces = []
    return finished, pieces


def _image_labels(image: DecodedImage, pieces: Sequence[SoftLabels], thresholds: Thresholds) -> ImageLabels:
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
        bucket=buckets_of(class_prob, target_prob, thresholds),
        operations=NO_OPERATIONS if image.crops.operations is None else image.crops.operations,
    )


def count_batch(logits_TBC: Sequence[Tensor], temperatures: Sequence[float], target: Tensor) -> list[Tensor]:
    """Compute the three sums of `TeacherCounts` for one batch, on the device of the logits, without waiting for it."""
    top1_TB = torch.stack([logits.argmax(dim=1) for logits in logits_TBC])
    known = target != UNKNOWN_TARGET
    right_TB = (top1_TB == target) & known
    agreement = (top1_TB[:, None] == top1_TB[None]).sum(dim=2)
    right_together = (right_TB[:, None] & right_TB[None]).sum(dim=2)
    p_max_TB = torch.stack([_p_max(logits, t) for logits, t in zip(logits_TBC, temperatures, strict=True)])
    # A teacher's NaN ends the build, but only when this batch is fetched, and an index must be in range until then.
    p_max_TB = p_max_TB.nan_to_num(0).clamp(0, 1)
    # 1.0 belongs to the last bin.
    bin_TB = (p_max_TB * TEACHER_BINS).long().clamp(max=TEACHER_BINS - 1)
    values = torch.stack(
        [known.expand_as(bin_TB).long(), right_TB.long(), known * (p_max_TB * P_MAX_UNITS).round().long()]
    )
    reliability = values.new_zeros((3, len(logits_TBC), TEACHER_BINS))
    return [agreement, right_together, reliability.scatter_add_(2, bin_TB.expand_as(values), values)]


def _p_max(logits: Tensor, temperature: float) -> Tensor:
    # The largest softmax is exp(max - logsumexp): no (B, C) softmax has to be stored.
    scaled = logits.float() / temperature
    return (scaled.amax(dim=1) - scaled.logsumexp(dim=1)).exp()


def _as_tuples(table: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())
