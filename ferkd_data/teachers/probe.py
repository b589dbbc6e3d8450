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
from ferkd_data.images import ImageRef, ImageSource, decode_rgb
from ferkd_data.replay import replay
from ferkd_data.teachers.outputs import check_activation, looks_like
from ferkd_data.teachers.teacher import Teacher

PROBE_IMAGES = 32
TELLING_IMAGES = 4
"""Different images with equal answers that show that a teacher always answers the same."""
ZEROS_OF_A_RELU = 0.01
"""Share of exact zeros among numbers that are never negative from which they look like features after a ReLU."""
CONTRADICTIONS = 0.1
"""Share of the names known to both sides that may have other numbers: lists of one data set differ in a few names."""
NAMES_SHOWN = 3


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

    Raises TeacherError that names the teacher for NaN or infinite logits, probabilities in place of logits, and
    answers that are the same for all images or all classes.
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
    # One by one, since any device has memory for one image. A model that gives one row for a whole batch is noticed
    # only at the first batch of the build.
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


def check_class_order(class_names: Sequence[str] | None, teacher: Teacher) -> None:
    """Raise UsageError where source and teacher name the same classes in another order.

    Nothing is raised where either has no names, or where most names are unknown to the other side.
    """
    theirs = teacher.class_names
    if class_names is None or theirs is None or len(class_names) != len(theirs):
        return
    known, wrong = _common_classes(class_names, theirs)
    # Few common names mean another vocabulary, such as WordNet IDs beside English: nothing can be compared.
    if len(known) < max(2, len(class_names) / 2) or not wrong:
        return
    # Where all names are known, one wrong number is a fault. Where only most are, a word may mean something else there.
    if len(known) == len(class_names) or len(wrong) > CONTRADICTIONS * len(known):
        shown = "; ".join(f"class {i} is {class_names[i]!r} here and {theirs[i]!r} there" for i in wrong[:NAMES_SHOWN])
        raise UsageError(
            f"teacher {teacher.spec}: knows the classes of the images in another order ({shown}); give --classes FILE "
            "with one line per class folder in the teacher's order"
        )


def _common_classes(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[int], list[int]]:
    """List our classes whose name both sides have, and those among them that have another number on their side.

    A synonym that two of our classes have tells nothing. ImageNet has two cranes and two maillots, which some lists of
    its names tell apart and some do not.
    """
    numbers = _numbers_by_synonym(theirs)
    unambiguous = {synonym for synonym, found in _numbers_by_synonym(ours).items() if len(found) == 1}
    known, wrong = [], []
    for number, name in enumerate(ours):
        found = set().union(*(numbers.get(synonym, set()) for synonym in _synonyms(name) & unambiguous))
        if found:
            known.append(number)
            if number not in found:
                wrong.append(number)
    return known, wrong


def _numbers_by_synonym(names: Sequence[str]) -> dict[str, set[int]]:
    """Map each synonym to the classes that have it."""
    numbers: dict[str, set[int]] = {}
    for number, name in enumerate(names):
        for synonym in _synonyms(name):
            numbers.setdefault(synonym, set()).add(number)
    return numbers


def _synonyms(name: str) -> set[str]:
    """Split a name at its commas; case, underscores and hyphens do not count. `tench, Tinca tinca` has two synonyms."""
    plain = name.casefold().replace("_", " ").replace("-", " ")
    return {" ".join(piece.split()) for piece in plain.split(",")}
