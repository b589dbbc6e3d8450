"""The protocols of a kind of teacher, and loading teachers by their specs.

`Teacher` is a classifier that is ready to run, and `LoadTeacher` makes one.

A kind is a module with a `LoadTeacher` and an entry in `spec.TEACHER_KINDS`. Kinds whose model is an `nn.Module`
return a `ModuleTeacher`.

Legend: B crops, C classes, S input size.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from ferkd_data.errors import DeviceFailedError, TeacherError
from ferkd_data.teachers.spec import TEACHER_KINDS, Preprocessing, TeacherSpec, Triple, parse_specs

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]

OUT_OF_MEMORY_TEXTS = (
    # PyTorch (also within a compiler's error), the driver, Triton, and ONNX Runtime's "CUDA failure 2: out of memory".
    "out of memory",
    "failed to allocate memory",
    "cublas_status_alloc_failed",
    "cufft_alloc_failed",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_device_allocation_failed",
    # Libraries that find no memory for their own workspace when they are first used.
    "cublas_status_not_initialized",
    "cudnn_status_not_initialized",
    # PyTorch, when each of cuDNN's algorithms ran out of memory or is not supported.
    "unable to find an engine to execute this computation",
)
"""Lower-case texts in errors that say that a device's memory ran out."""
DEVICE_FAILURE = re.compile(r"CUDA (driver )?error: (?!CUBLAS)|CUDA failure \d+: |_STATUS_EXECUTION_FAILED")
"""Texts in errors of a GPU that failed, of PyTorch before 2.8, of cuBLAS and cuDNN, and of ONNX Runtime."""
UNSUITABLE_DEVICE = re.compile(r"no kernel image is available|invalid device ordinal")
"""Texts in errors of a GPU that PyTorch, ONNX Runtime or a teacher's own kernels cannot use, in any process."""


class Teacher(Protocol):
    """A frozen classifier that is ready to run on its device."""

    spec: TeacherSpec
    preprocessing: Preprocessing
    """Input that `logits` expects; normalisation is the teacher's own work."""
    num_classes: int
    digest: str
    """SHA-256, 64 hex digits, of the model: weights, structure and hyperparameters, or the bytes of its file.
    `digest.py` has functions for both. Input size, normalisation and precision are facts of their own."""
    precision: Precision
    class_names: tuple[str, ...] | None
    """Names of the classes in the order of the outputs, where the model knows them."""
    published_top1: float | None
    """Accuracy on ImageNet-1k in 0..1, where the library of the model states it."""
    hints: tuple[str, ...]
    """Remarks for the user, such as why the teacher is slow. They decide nothing."""

    def logits(self, images_BCSS: Tensor) -> Tensor:
        """Return logits (B, C) float32 of uint8 RGB images (B, 3, S, S), on the device of the images.

        Raises TeacherError where the model fails, DeviceFailedError where the device does, and the library's own error
        where memory runs out, which `is_out_of_memory` recognises.
        """

    def renormalised(self, mean: Triple, std: Triple) -> Teacher:
        """Return the same teacher with another normalisation; `evaluate` uses it to find a wrong one."""


class LoadTeacher(Protocol):
    """The function that a kind of teacher provides; `spec.TEACHER_KINDS` names it."""

    def __call__(self, spec: TeacherSpec, *, device: str, precision: Precision) -> Teacher:
        """Load a teacher. Raises TeacherError that names the teacher and what to do, and MissingExtraError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise an error that says that memory ran out; a smaller batch may fit. Such errors have no common class."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    # By text, since cuBLAS, a compiler and ONNX Runtime raise a plain RuntimeError or a class of their own.
    said = str(error).lower()
    return any(text in said for text in OUT_OF_MEMORY_TEXTS)


def is_device_failure(error: BaseException) -> bool:
    """Recognise an error of a GPU that failed: this process cannot use it any more, and a new one can."""
    # PyTorch raises its class for a failure in these cases too.
    if is_out_of_memory(error) or UNSUITABLE_DEVICE.search(str(error)):
        return False
    kind = getattr(torch, "AcceleratorError", None)
    return (kind is not None and isinstance(error, kind)) or bool(DEVICE_FAILURE.search(str(error)))


def refuse_failed_device(device: object, error: BaseException, teacher: TeacherSpec | None = None) -> None:
    """Raise DeviceFailedError where `error` says that a GPU failed; else do nothing."""
    if is_device_failure(error):
        raise device_failed(device, error, teacher) from error


def device_failed(device: object, error: BaseException, teacher: TeacherSpec | None = None) -> DeviceFailedError:
    """Return the error to raise for a device that failed with `error`, where known while it ran `teacher`."""
    # A teacher can be the cause: an index out of range in its own code triggers a device-side assert.
    meanwhile = "" if teacher is None else f" while it ran teacher {teacher}"
    return DeviceFailedError(
        f"device {device} failed{meanwhile} ({first_line(error)}); only a new process can use it again, and "
        "goes on after the finished shards"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error: BaseException) -> str:
    """Shorten an error to its type and first line, for a message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def load_teacher(spec: TeacherSpec, *, device: str = "cpu", precision: Precision = "fp32") -> Teacher:
    """Load one teacher. Raises TeacherError or MissingExtraError, naming the teacher and what to do."""
    # Imported when it is used: each kind needs a library that may be missing, and that takes seconds to import.
    module, _, function = TEACHER_KINDS[spec.kind].load.partition(".")
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
    parsed = parse_specs(specs)
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
        return "bf16" if device.startswith("cuda") and TEACHER_KINDS[spec.kind].takes_precision else "fp32"
    if wanted not in ("fp32", "bf16", "fp16"):
        raise TeacherError(f"precision must be auto, fp32, bf16 or fp16, got {wanted!r}")
    return wanted  # type: ignore[return-value]
