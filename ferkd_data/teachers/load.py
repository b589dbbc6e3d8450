"""Load teachers by their specs.

Whether the classes of the images and those of a teacher are the same, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import assert_never

from ferkd_data.errors import TeacherError, UsageError
from ferkd_data.teachers.spec import TeacherSpec
from ferkd_data.teachers.teacher import Precision, Teacher


def load_teacher(spec: TeacherSpec, *, device: str = "cpu", precision: Precision = "fp32") -> Teacher:
    """Load one teacher. Raises TeacherError or MissingExtraError, naming the teacher and what to do."""
    if spec.kind == "timm":
        from ferkd_data.teachers import timm_models

        return timm_models.load(spec, device=device, precision=precision)
    if spec.kind == "torchvision":
        from ferkd_data.teachers import torchvision_models

        return torchvision_models.load(spec, device=device, precision=precision)
    if spec.kind == "hf":
        from ferkd_data.teachers import hf_models

        return hf_models.load(spec, device=device, precision=precision)
    if spec.kind == "openclip":
        from ferkd_data.teachers import openclip_models

        return openclip_models.load(spec, device=device, precision=precision)
    if spec.kind == "onnx":
        from ferkd_data.teachers import onnx_models

        return onnx_models.load(spec, device=device, precision=precision)
    from ferkd_data.teachers import own_models

    if spec.kind == "torchscript":
        return own_models.load_torchscript(spec, device=device, precision=precision)
    if spec.kind == "python":
        return own_models.load_python(spec, device=device, precision=precision)
    assert_never(spec.kind)


def load_teachers(
    specs: Sequence[TeacherSpec | str], *, device: str = "cpu", precision: str = "auto", used_on: str | None = None
) -> list[Teacher]:
    """Load all teachers of an ensemble; precision `auto` is bf16 on cuda (fp32 for ONNX files) and fp32 on a CPU.

    `used_on` is the device on which the teachers will label, where they are loaded here only to be looked at.

    Raises TeacherError when there is none, or they disagree on the number of classes.
    """
    if not specs:
        raise TeacherError("an ensemble needs at least one teacher")
    parsed = [spec if isinstance(spec, TeacherSpec) else TeacherSpec.parse(spec) for spec in specs]
    teachers = [
        load_teacher(spec, device=device, precision=_precision(spec, used_on or device, precision)) for spec in parsed
    ]
    first = teachers[0]
    for teacher in teachers[1:]:
        if teacher.num_classes != first.num_classes:
            raise TeacherError(
                f"teacher {first.spec} knows {first.num_classes} classes, "
                f"teacher {teacher.spec} knows {teacher.num_classes}"
            )
    return teachers


def _precision(spec: TeacherSpec, device: str, wanted: str) -> Precision:
    if wanted == "auto":
        return "bf16" if device.startswith("cuda") and spec.kind != "onnx" else "fp32"
    if wanted not in ("fp32", "bf16", "fp16"):
        raise TeacherError(f"precision must be auto, fp32, bf16 or fp16, got {wanted!r}")
    return wanted  # type: ignore[return-value]


CONTRADICTIONS = 0.1
"""Share of the names known to both sides that may be elsewhere: lists of one data set differ in a few names."""
NAMES_SHOWN = 3


def check_class_count(
    num_classes: int, *, class_names: Sequence[str] | None, max_target: int, classes_given: bool
) -> None:
    """Raise UsageError where the images' targets cannot be the teachers' classes.

    `class_names` are those of the source, `max_target` is -1 where no image has a target; `classes_given` says that
    the names come from --classes.
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

    Nothing is known, and nothing raised, where either has no names or most of them are in another vocabulary.
    """
    theirs = teacher.class_names
    if class_names is None or theirs is None or len(class_names) != len(theirs):
        return
    elsewhere = _elsewhere(class_names, theirs)
    known, wrong = elsewhere
    if len(known) < max(2, len(class_names) / 2) or not wrong:
        return
    if len(known) == len(class_names) or len(wrong) > CONTRADICTIONS * len(known):
        shown = "; ".join(f"class {i} is {class_names[i]!r} here and {theirs[i]!r} there" for i in wrong[:NAMES_SHOWN])
        raise UsageError(
            f"teacher {teacher.spec}: knows the classes of the images in another order ({shown}); give --classes FILE "
            "with one line per class folder in the teacher's order"
        )


def _elsewhere(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[int], list[int]]:
    """Classes whose name both sides have, and those of them that have another number there."""
    places: dict[str, set[int]] = {}
    for number, name in enumerate(theirs):
        for synonym in _synonyms(name):
            places.setdefault(synonym, set()).add(number)
    known, wrong = [], []
    for number, name in enumerate(ours):
        found = set().union(*(places.get(synonym, set()) for synonym in _synonyms(name)))
        if found:
            known.append(number)
            if number not in found:
                wrong.append(number)
    return known, wrong


def _synonyms(name: str) -> set[str]:
    """`tench, Tinca tinca` has two; capitals, underscores and hyphens do not count."""
    plain = name.casefold().replace("_", " ").replace("-", " ")
    return {" ".join(piece.split()) for piece in plain.split(",")}
