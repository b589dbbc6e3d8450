"""Check teachers before a build: their answers on a few images, and their classes against those of the source.

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
from ferkd_data.errors import ImageError, TeacherError, UsageError
from ferkd_data.images import ImageRef, ImageSource, contradictions, decode_rgb, order_note
from ferkd_data.replay import replay
from ferkd_data.teachers.outputs import check_activation, looks_like
from ferkd_data.teachers.teacher import Teacher, is_out_of_memory

PROBE_IMAGES = 32
TELLING_IMAGES = 4
"""Different images with equal answers that show that a teacher always answers the same."""
ZEROS_OF_A_RELU = 0.01
"""Share of exact zeros among numbers that are never negative from which they look like features after a ReLU."""
STEADY_IMAGES = 16
"""Images that are asked about one by one and in a batch. With 2, one dropout in nine went unnoticed."""
UNSTEADY = 0.15
"""Difference between two answers to one image, relative to their spread over the classes, from which a teacher answers
by chance or by its batch. Measured on EfficientNet-Lite0 with 16 images: bfloat16 0.005, dynamic int8 0.03, one of its
batch normalisations in training mode 0.17 to 4.1, a dropout of 0.1 before the classifier 0.36."""


@dataclass(frozen=True, kw_only=True)
class TeacherProbe:
    """Answers of one teacher to the images of a probe."""

    teacher: str
    """Spec of the teacher."""
    images: int
    input_size: int
    """Side of the square input in pixels."""
    num_classes: int
    """Numbers in the answer to each image."""
    top1: float | None
    """Accuracy in 0..1 on the images with a target; None where no image has one."""
    p_max: tuple[float, float, float]
    """Minimum, median and maximum, over the images, of the largest probability at the teacher's temperature."""
    all_equal: float
    """Share in 0..1 of the images to which the teacher gives every class the same probability."""
    hints: tuple[str, ...]
    """Remarks for the user: why the teacher is slow, or what looks odd. They stop nothing."""


def probe_teachers(
    teachers: Sequence[Teacher], source: ImageSource, refs: Iterable[ImageRef], *, device: str = "cpu"
) -> tuple[TeacherProbe, ...]:
    """Run each teacher on central crops of the first PROBE_IMAGES of `refs`, leaving out what cannot be decoded.

    `device` is the one on which the teachers were loaded. The result is empty where no image can be decoded.

    Raises TeacherError that names the teacher for NaN or infinite logits, probabilities in place of logits, answers
    that are the same for all images or all classes, and answers that depend on the batch or on chance.
    """
    chosen = list(itertools.islice(refs, PROBE_IMAGES))
    pictures, targets = _decoded(source, chosen)
    if not pictures:
        return ()
    return tuple(_probe(teacher, pictures, targets, device) for teacher in teachers)


def centre_crop(image_HWC: npt.NDArray[np.uint8], teacher: Teacher) -> Tensor:
    """Cut the central square that the teacher's own evaluation uses, as uint8 (1, 3, S, S)."""
    wanted = teacher.preprocessing
    height, width = image_HWC.shape[:2]
    # Resizing to S / crop_pct and cropping S is, but for rounding, cutting this square and
    # resizing it to S.
    side = max(1, round(min(height, width) * wanted.crop_pct))
    box = np.array([[(height - side) // 2, (width - side) // 2, side, side]], np.uint16)
    crops = Crops(boxes=box, flip=np.array([False]))
    return replay(image_HWC, crops, size=wanted.size, interpolation=wanted.interpolation)


def count_different(images_BCSS: Tensor) -> int:
    """Count the different images in a batch (B, 3, S, S)."""
    return len({image.numpy().tobytes() for image in images_BCSS.cpu()})


def check_answers(logits_BC: Tensor, num_different: int, teacher: Teacher) -> None:
    """Raise TeacherError where logits of `num_different` different images cannot be a classifier's.

    Refused are NaN and infinite logits, probabilities, and answers equal for all classes or for all images.
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
    # With fewer images, the same answer may be right.
    if num_different >= TELLING_IMAGES and bool((logits_BC == logits_BC[:1]).all()):
        raise TeacherError(
            f"teacher {spec} gives the same answer for all of {num_different} different images; check its weights and "
            "its preprocessing (mean, std)"
        )


def check_steady(alone_BC: Tensor, together_BC: Tensor, teacher: Teacher) -> None:
    """Raise TeacherError where the answer to an image depends on the other images of its batch, or on chance.

    `alone_BC` are the logits of images one by one, `together_BC` those of the same images in a batch. They differ in
    training mode, which a module may turn on by itself and a traced or exported file may have stored.
    """
    # Variances over the classes: what is added to all of them changes no probability.
    difference = float((together_BC - alone_BC).var(dim=1).mean().sqrt())
    if difference > UNSTEADY * float(alone_BC.var(dim=1).mean().sqrt()):
        raise TeacherError(
            f"teacher {teacher.spec} gives images other logits one by one than in a batch (different by "
            f"{difference:.3g}), so its labels would depend on the batch or on chance: is dropout or batch "
            "normalisation in training mode? Trace or export a model after eval()"
        )


def odd_answers(logits_BC: Tensor, teacher: Teacher) -> tuple[str, ...]:
    """Describe answers that few classifiers give; empty where nothing looks odd."""
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
    # One by one, since any device has memory for one image.
    logits = torch.cat([teacher.logits(image[None].to(device)).cpu() for image in batch])
    check_answers(logits, count_different(batch), teacher)
    check_steady(logits[:STEADY_IMAGES], _together(teacher, batch[:STEADY_IMAGES].to(device)), teacher)
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


def _together(teacher: Teacher, images_BCSS: Tensor) -> Tensor:
    """Return the logits of a batch on the CPU; where there is no room for it, those of the images one by one."""
    try:
        return teacher.logits(images_BCSS).cpu()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return torch.cat([teacher.logits(image[None]).cpu() for image in images_BCSS])


def _equal_rows(values_BC: Tensor) -> Tensor:
    """Tell for each row whether all its values are equal: bool (B,)."""
    return (values_BC == values_BC[:, :1]).all(dim=1)


def _decoded(source: ImageSource, refs: Sequence[ImageRef]) -> tuple[list[npt.NDArray[np.uint8]], list[int | None]]:
    """Decode the images that can be decoded, as (H, W, 3), with their targets."""
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


def check_class_count(
    num_classes: int, *, class_names: Sequence[str] | None, max_target: int, classes_given: bool
) -> None:
    """Raise UsageError where the images' targets cannot be the teachers' classes.

    `class_names` are the source's; `classes_given` says that they come from --classes. `max_target` is the largest
    target, -1 where no image has one.
    """
    if max_target >= num_classes:
        raise UsageError(
            f"the images have targets up to {max_target}, but the teachers give {num_classes} numbers for each image, "
            f"classes 0 to {num_classes - 1}: is it the right model, and its classifier's output?"
        )
    if class_names is None or len(class_names) == num_classes:
        return
    if classes_given:
        raise UsageError(
            f"--classes has {len(class_names)} lines, the teachers give {num_classes} numbers for each image; it needs "
            "one line for each of the teachers' outputs, in their order, also for classes without images"
        )
    if max_target >= 0:
        raise UsageError(
            f"{len(class_names)} classes in the source, {num_classes} in the teachers: which is which? "
            "Give --classes FILE, one line per class folder in the order of the teachers' outputs"
        )


def check_class_orders(
    teachers: Sequence[Teacher], *, class_names: Sequence[str] | None, sorted_folders: Sequence[str] | None
) -> None:
    """Raise UsageError where the images' classes and the teachers' are in different orders.

    `class_names` are those of the images, `sorted_folders` the class folders where they were numbered in sorted order.
    """
    for teacher in teachers:
        check_class_order(class_names, teacher)
    check_same_order(teachers)
    check_folder_order(sorted_folders, teachers)


def check_class_order(class_names: Sequence[str] | None, teacher: Teacher) -> None:
    """Raise UsageError where source and teacher name the same classes in another order.

    Nothing is raised where either has no names, or where most names are unknown to the other side.
    """
    shown = contradictions(class_names, teacher.class_names)
    if shown:
        raise UsageError(
            f"teacher {teacher.spec}: knows the classes of the images in another order ({shown}); give --classes FILE "
            "with one line per class folder in the teacher's order"
        )


def check_same_order(teachers: Sequence[Teacher]) -> None:
    """Raise UsageError where two teachers name the same classes in another order, so that no ensemble can be made.

    A teacher without names, or with names that most others do not know, is not compared.
    """
    for teacher, other in itertools.combinations(teachers, 2):
        shown = contradictions(teacher.class_names, other.class_names)
        if shown:
            raise UsageError(
                f"teachers {teacher.spec} and {other.spec}: know the same classes in another order ({shown}); wrap one "
                "of them in a python: teacher that brings its outputs into the other's order"
            )


def check_folder_order(folders: Sequence[str] | None, teachers: Sequence[Teacher]) -> None:
    """Raise UsageError where timm would number class folders, which were numbered in sorted order, in another order.

    timm's own reader puts 2 before 10 and takes no notice of case; torchvision's ImageFolder sorts by characters.
    """
    teacher = next((teacher for teacher in teachers if teacher.spec.kind == "timm"), None)
    differing = order_note(folders or ())
    if teacher is not None and differing:
        raise UsageError(
            f"teacher {teacher.spec}: {differing}. Which of them numbered its classes? Give --classes FILE with one "
            "line per class folder in the order of its outputs; `ferkd-data evaluate` tells which order is right"
        )
