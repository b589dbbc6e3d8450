"""Compile teachers with `torch.compile`, for one batch size."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ferkd_data.errors import DeviceFailedError, TeacherError, UsageError
from ferkd_data.teachers.module_teacher import ModuleTeacher
from ferkd_data.teachers.teacher import Teacher, is_out_of_memory, reason

BACKEND: Any = "inductor"
"""Compiler back end: a name, or a function as torch.compile takes it."""


def compile_teachers(teachers: Sequence[Teacher], batch_size: int) -> list[Teacher]:
    """Compile the teachers that can be compiled; ONNX and TorchScript files stay as they are.

    Raises UsageError when no teacher can be compiled, TeacherError when compiling one fails.
    """
    if not any(map(is_plain_module, teachers)):
        raise UsageError(
            "compile: ONNX and TorchScript teachers cannot be compiled, and there are no others; drop the option"
        )
    return [compile_teacher(teacher, batch_size) if is_plain_module(teacher) else teacher for teacher in teachers]


def is_plain_module(teacher: Teacher) -> TypeGuard[ModuleTeacher]:
    """Return whether a teacher is a PyTorch module that can be compiled or exported."""
    module = teacher.module if isinstance(teacher, ModuleTeacher) else None
    if not isinstance(module, nn.Module):
        return False
    return not any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())


def compile_teacher(teacher: ModuleTeacher, batch_size: int) -> ModuleTeacher:
    """Compile a teacher for `batch_size`, or for less where memory runs out. Raises TeacherError.

    A test batch makes PyTorch compile now: the first batch of a build may have a time limit.
    """
    # A shallow copy: weights are shared, and the teacher that was given still runs without the compiler.
    other = copy.copy(teacher)
    other.module = network = _OneSize(torch.compile(teacher.module, backend=BACKEND, dynamic=False), batch_size)
    while not _runs(other, batch_size := network.batch_size):
        # Not in `_runs`, where the caught exception still holds the tensors of its frames.
        torch.cuda.empty_cache()
        # Memory may have run out before the network was asked, which halves its batch by itself.
        if network.batch_size == batch_size:
            network.batch_size = batch_size // 2
    return other


def _runs(teacher: ModuleTeacher, batch_size: int) -> bool:
    """Run one batch; return False where memory ran out and a smaller batch can be tried. Raises TeacherError."""
    size = teacher.preprocessing.size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            teacher.logits(torch.zeros((batch_size, 3, size, size), dtype=torch.uint8, device="cpu"))
    except DeviceFailedError:
        raise
    except Exception as error:
        if is_out_of_memory(error) and batch_size > 1:
            return False
        # The compiler's exceptions share no base class but Exception.
        raise TeacherError(f"teacher {teacher.spec}: cannot be compiled ({reason(error)}); drop --compile") from error
    return True


class _OneSize:
    """Run a compiled module on batches of one size, by splitting and padding: another size would be compiled anew."""

    def __init__(self, module: Callable[[Tensor], Tensor], batch_size: int) -> None:
        self.module = module
        self.batch_size = batch_size

    def __call__(self, images_BCSS: Tensor) -> Tensor:
        parts = [self._ask(part) for part in torch.split(images_BCSS, self.batch_size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _ask(self, images_BCSS: Tensor) -> Tensor:
        short = self.batch_size - len(images_BCSS)
        padded = images_BCSS
        try:
            if short:
                # Rows do not depend on each other, so any crop fills up; these answers are cut off below.
                fill = images_BCSS[-1:].expand(short, -1, -1, -1)
                padded = torch.cat([images_BCSS, fill]).contiguous(memory_format=torch.channels_last)
            return self.module(padded)[: len(images_BCSS)]
        except Exception as error:
            if is_out_of_memory(error):
                # The caller tries again with half the batch, which must not be padded to the size that was too large.
                self.batch_size = max(1, self.batch_size // 2)
            raise
