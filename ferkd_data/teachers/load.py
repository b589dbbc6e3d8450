"""Load teachers by their specs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ferkd_data.errors import TeacherError
from ferkd_data.teachers.spec import KINDS, TeacherSpec
from ferkd_data.teachers.teacher import LoadTeacher, Precision, Teacher


def load_teacher(spec: TeacherSpec, *, device: str = "cpu", precision: Precision = "fp32") -> Teacher:
    """Load one teacher. Raises TeacherError or MissingExtraError, naming the teacher and what to do."""
    # Imported when it is used: each kind needs a library that may be missing, and that takes seconds to import.
    module, _, function = KINDS[spec.kind].load.partition(".")
    load: LoadTeacher = getattr(importlib.import_module(f"ferkd_data.teachers.{module}"), function)
    return load(spec, device=device, precision=precision)


def load_teachers(
    specs: Sequence[TeacherSpec | str], *, device: str = "cpu", precision: str = "auto", used_on: str | None = None
) -> list[Teacher]:
    """Load all teachers of an ensemble. Precision `auto` is bf16 on CUDA (fp32 for ONNX files) and fp32 on a CPU.

    `used_on` is the device that decides `auto` where the teachers are loaded on another one only to be inspected.

    Raises TeacherError where `specs` is empty, and where the teachers disagree on the number of classes.
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
    # bf16 and not fp16: it has float32's range, so that no activation of a large network overflows.
    if wanted == "auto":
        return "bf16" if device.startswith("cuda") and KINDS[spec.kind].takes_precision else "fp32"
    if wanted not in ("fp32", "bf16", "fp16"):
        raise TeacherError(f"precision must be auto, fp32, bf16 or fp16, got {wanted!r}")
    return wanted  # type: ignore[return-value]
