"""A first look at what teachers say: a few images, before a week of work.

Legend: B images, C classes, S input size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.crops import Crops
from ferkd_data.errors import ImageError, TeacherError
from ferkd_data.images import ImageRef, ImageSource, decode_rgb
from ferkd_data.replay import replay
from ferkd_data.teachers.outputs import check_activation, looks_like
from ferkd_data.teachers.teacher import Teacher

PROBE_IMAGES = 32
TELLING_IMAGES = 4
"""Fewer different images do not show that an answer never changes."""
ZEROS_OF_A_RELU = 0.01
"""Share of exact zeros, none of the other numbers being negative, that marks features after a ReLU."""


@dataclass(frozen=True, kw_only=True)
class TeacherProbe:
    """What one teacher said of the probe's images."""

    teacher: str
    """Its spec."""
    images: int
    input_size: int
    """Side of the square input in pixels."""
    num_classes: int
    """Numbers that it gives for each image."""
    top1: float | None
    """Share in 0..1 of the images with a known target whose class it names first; None where none has one."""
    p_max: tuple[float, float, float]
    """Smallest, median and largest of the images' largest probabilities, at the teacher's temperature."""
    all_equal: float
    """Share in 0..1 of the images for which every class is equally likely."""
    hints: tuple[str, ...]
    """Remarks for the user: why it is slow, or what looks odd. They stop nothing."""


def probe_teachers(
    teachers: Sequence[Teacher], source: ImageSource, refs: Iterable[ImageRef], *, device: str = "cpu"
) -> tuple[TeacherProbe, ...]:
    """Show the first 32 of `refs` that can be decoded to each teacher, as central crops.

    `device` is where the teachers were loaded. The result is empty where no image can be decoded.

    Raises TeacherError that names the teacher for NaN or infinite logits, probabilities in place of logits, and
    answers that are the same for all images or all classes.
    """
    chosen = list(itertools.islice(refs, PROBE_IMAGES))
    pictures, targets = _decoded(source, chosen)
    if not pictures:
        return ()
    return tuple(_probe(teacher, pictures, targets, device) for teacher in teachers)


def centre_crop(image_HWC: npt.NDArray[np.uint8], teacher: Teacher) -> Tensor:
    """uint8 (1, 3, S, S): the central square that the teacher's own evaluation looks at."""
    wanted = teacher.preprocessing
    height, width = image_HWC.shape[:2]
    side = max(1, round(min(height, width) * wanted.crop_pct))
    box = np.array([[(height - side) // 2, (width - side) // 2, side, side]], np.uint16)
    crops = Crops(boxes=box, flip=np.array([False]))
    return replay(image_HWC, crops, size=wanted.size, interpolation=wanted.interpolation)


def count_different(images_BCSS: Tensor) -> int:
    """How many different pictures a batch has."""
    return len({image.numpy().tobytes() for image in images_BCSS.cpu()})


def check_answers(logits_BC: Tensor, num_different: int, teacher: Teacher) -> None:
    """Raise TeacherError where logits of `num_different` different images cannot be a classifier's.

    Those are NaN or infinite, probabilities, equal for all classes, or equal for all images.
    """
    spec = teacher.spec
    if not torch.isfinite(logits_BC).all():
        raise TeacherError(
            f"teacher {spec} gave NaN or infinite logits; check its weights and precision (--precision fp32)"
        )
    if spec.activation is None:
        check_activation(logits_BC, spec)
    if _equal_rows(logits_BC).all():
        raise TeacherError(f"teacher {spec} gives the same for every class, on every image; check its weights")
    if num_different >= TELLING_IMAGES and bool((logits_BC == logits_BC[:1]).all()):
        raise TeacherError(
            f"teacher {spec} gives the same answer for all of {num_different} different images; check its weights and "
            "its preprocessing (mean, std)"
        )


def odd_answers(logits_BC: Tensor, teacher: Teacher) -> tuple[str, ...]:
    """Remarks about answers that few classifiers give."""
    if teacher.spec.activation is not None or float(logits_BC.min()) < 0:
        return ()
    if looks_like(logits_BC) == "sigmoid":
        return (
            "all its numbers are within 0..1, as those of a sigmoid are, so that a softmax makes the classes about "
            "equally likely; if they are, add ?activation=sigmoid",
        )
    if float((logits_BC == 0).float().mean()) < ZEROS_OF_A_RELU:
        return ()
    return (
        f"none of its {logits_BC.shape[1]} numbers is ever negative and many are 0, as features after a ReLU are: are "
        "they class logits?",
    )


def _probe(
    teacher: Teacher, pictures: Sequence[npt.NDArray[np.uint8]], targets: Sequence[int | None], device: str
) -> TeacherProbe:
    batch = torch.cat([centre_crop(picture, teacher) for picture in pictures])
    # One by one: any teacher has room for one image, whatever batch size it is to be used with. A model that gives one
    # row for a whole batch is not noticed here, but at the first batch of the build.
    logits = torch.cat([teacher.logits(image[None].to(device)).cpu() for image in batch])
    check_answers(logits, count_different(batch), teacher)
    prob = (logits / teacher.spec.temperature).softmax(dim=1)
    known = [number for number, target in enumerate(targets) if target is not None]
    right = sum(int(logits[number].argmax()) == targets[number] for number in known)
    p_max = prob.max(dim=1).values
    return TeacherProbe(
        teacher=str(teacher.spec),
        images=len(pictures),
        input_size=teacher.preprocessing.size,
        num_classes=teacher.num_classes,
        top1=right / len(known) if known else None,
        p_max=(float(p_max.min()), float(p_max.median()), float(p_max.max())),
        all_equal=float(_equal_rows(prob).float().mean()),
        hints=(*teacher.hints, *odd_answers(logits, teacher)),
    )


def _equal_rows(values_BC: Tensor) -> Tensor:
    """(B,) bool"""
    return (values_BC == values_BC[:, :1]).all(dim=1)


def _decoded(source: ImageSource, refs: Sequence[ImageRef]) -> tuple[list[npt.NDArray[np.uint8]], list[int | None]]:
    """The images that can be decoded, with their targets."""
    pictures, targets = [], []
    for ref, data in zip(refs, source.read(refs), strict=True):
        if isinstance(data, ImageError):
            continue
        try:
            pictures.append(decode_rgb(data))
        except ImageError:
            continue
        targets.append(ref.target)
    return pictures, targets
