"""Restrict a GPU to kernels of the stated precision, chosen the same way every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ferkd_data.errors import TeacherError

BF16_SINCE = (8, 0)
"""NVIDIA's compute capability with bfloat16 in hardware; before that PyTorch imitates it, slowly."""


@contextmanager
def faithful_kernels(precision: str) -> Iterator[None]:
    """Use kernels that give the same labels on the same kind of machine, whatever the process has set.

    cuDNN does not try out which kernel is the fastest today, and float32 is not rounded to TF32, which has the 10 bits
    of float16 and is PyTorch's default in convolutions.
    """
    with ExitStack() as kept:
        _set(kept, torch.backends.cudnn, "benchmark", False)
        if precision == "fp32":
            _whole_float32(kept)
        yield


def check_precision(teacher: str, device: torch.device, precision: str) -> None:
    """Raises TeacherError for a precision that the device has not got."""
    if device.type != "cuda" or precision != "bf16" or torch.version.hip:
        return
    if torch.cuda.get_device_capability(device) < BF16_SINCE:
        name = torch.cuda.get_device_name(device)
        raise TeacherError(f"teacher {teacher}: {name} has no bfloat16; use --precision fp16 or fp32")


def _whole_float32(kept: ExitStack) -> None:
    """Set float32 by both of PyTorch's ways: the newer (2.9) decides, the older cannot be read while the two differ."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    places: list[Any] = [getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None), matmul]
    newer = [place for place in places if hasattr(place, "fp32_precision")]
    # Last in, first out: what the older way writes back is written over by the newer.
    for place in newer:
        kept.callback(setattr, place, "fp32_precision", place.fp32_precision)
    _set(kept, cudnn, "allow_tf32", False)
    _change(kept, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
    for place in newer:
        place.fp32_precision = "ieee"


def _set(kept: ExitStack, place: Any, name: str, value: Any) -> None:
    _change(kept, lambda: getattr(place, name), lambda value: setattr(place, name, value), value)


def _change(kept: ExitStack, read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> None:
    """Set a value until `kept` is left. A value that cannot be read is left alone."""
    try:
        before = read()
    except RuntimeError:
        return
    kept.callback(write, before)
    write(value)
