"""Load teachers by their specs."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import assert_never

from ferkd_data.errors import TeacherError
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
