"""The teachers' forward passes, and the transfers between host and device around them.

`Forwards` asks one teacher, with smaller batches where the device runs out of memory, and names it in errors.

`Staging` uploads pixels and fetches answers without host and device waiting for each other. On a GPU there are three
streams: crops are cut on one, the teachers compute on another, answers are copied on the third. Events order them.
Uploads come out of pinned memory and answers go to pinned memory, which alone can be copied in the background. On a
CPU all of it is a pass-through, so that the loop of a build is the same.

Legend: B crops of a batch, C classes, S output side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.errors import FerkdError, TeacherError
from ferkd_data.teachers import Teacher, TeacherSpec
from ferkd_data.teachers.teacher import is_out_of_memory, reason, refuse_failed_device


class Observer(Protocol):
    """Hears when teachers are asked; called in the thread that asks them."""

    def asking(self, teachers: Sequence[TeacherSpec]) -> None:
        """Called when this process begins to wait for these teachers."""

    def answered(self) -> None:
        """Called when the wait is over."""

    def halved(self, teacher: str, crops: int) -> None:
        """Called when the device ran out of memory, and the teacher gets `crops` at a time from then on."""


class NullObserver:
    """An observer that does nothing."""

    def asking(self, teachers: Sequence[TeacherSpec]) -> None:
        pass

    def answered(self) -> None:
        pass

    def halved(self, teacher: str, crops: int) -> None:
        pass


@dataclass(kw_only=True)
class Forwards:
    """Runs teachers on batches. Belongs to the thread that labels."""

    observer: Observer = field(default_factory=NullObserver)
    _most: dict[TeacherSpec, int] = field(default_factory=dict)
    """By teacher: crops that it gets at a time, where memory ran out with more."""

    def logits(self, teacher: Teacher, images_BCSS: Tensor) -> Tensor:
        """Return (B, C) float32 for pixels (B, 3, S, S) uint8. Raises TeacherError, DeviceFailedError."""
        self.observer.asking([teacher.spec])
        while (logits := self._try(teacher, images_BCSS)) is None:
            # Not in the except block: there, the exception still refers to the tensors of its frames.
            torch.cuda.empty_cache()
            self.observer.halved(str(teacher.spec), self._most[teacher.spec])
        return logits

    def _try(self, teacher: Teacher, images_BCSS: Tensor) -> Tensor | None:
        """Return None where memory ran out; the next try then has half as many crops at a time."""
        step = min(len(images_BCSS), self._most.get(teacher.spec, len(images_BCSS)))
        try:
            if step == len(images_BCSS):
                return teacher.logits(images_BCSS)
            return torch.cat([teacher.logits(part) for part in torch.split(images_BCSS, step)])
        except FerkdError:
            raise
        except Exception as error:
            refuse_failed_device(images_BCSS.device, error, teacher.spec)
            if not is_out_of_memory(error):
                raise TeacherError(
                    f"teacher {teacher.spec}: failed on {len(images_BCSS)} crops: {type(error).__name__}: {error}"
                ) from error
            if step <= 1:
                raise TeacherError(
                    f"teacher {teacher.spec}: the device has too little memory for a single crop "
                    f"({reason(error)}); end what else runs on it, or use fewer --workers or teachers"
                ) from error
            self._most[teacher.spec] = step // 2
            return None


Wait = Callable[[], None]


class Fetched(NamedTuple):
    """Tensors that are being copied to the host. Do not read them before `wait` has returned."""

    tensors: list[Tensor]
    wait: Wait


class Staging(Protocol):
    """Transfers between the host and the device of the teachers."""

    on_device: bool
    """True where crops are cut on the device; else they are cut on the host."""

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """Upload and compute on the cutting stream while the context lasts. May be entered in any thread."""

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        """Return the array on the device, in the order of the current stream. The host may change its own at once."""

    def mark(self) -> Any:
        """Return the present moment of the cutting stream, for `join`. Called inside `cutting`."""

    def join(self, moment: Any, tensors: Sequence[Tensor]) -> None:
        """Make the teachers' stream wait for `moment` before it uses `tensors`. The host does not wait."""

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        """Begin to copy `tensors`, which the teachers' stream computes, into host memory."""


class HostStaging:
    """Staging for teachers on the CPU: nothing has to be moved."""

    on_device = False

    @contextmanager
    def cutting(self) -> Iterator[None]:
        yield

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array)

    def mark(self) -> Any:
        return None

    def join(self, moment: Any, tensors: Sequence[Tensor]) -> None:
        pass

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        return Fetched(list(tensors), lambda: None)


class CudaStaging:
    """Staging for teachers on a GPU. One for the whole life of a worker, since each stream keeps memory of its own."""

    on_device = True

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.cut_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.fetch_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @contextmanager
    def cutting(self) -> Iterator[None]:
        # One stream for all cutting threads: the device runs their work in the order in which it was submitted.
        with torch.cuda.stream(self.cut_stream):
            yield

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        # PyTorch's allocator does not reuse pinned memory before the copy that reads it is done.
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

    def mark(self) -> Any:
        return self.cut_stream.record_event()

    def join(self, moment: Any, tensors: Sequence[Tensor]) -> None:
        teachers = torch.cuda.current_stream(self.device)
        teachers.wait_event(moment)
        for tensor in tensors:
            # The allocator must not give their memory to the cutting stream's next crops while teachers read it.
            tensor.record_stream(teachers)

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        self.fetch_stream.wait_stream(torch.cuda.current_stream(self.device))
        copies = []
        with torch.cuda.stream(self.fetch_stream):
            for tensor in tensors:
                copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
                copies.append(copy.copy_(tensor, non_blocking=True))
                tensor.record_stream(self.fetch_stream)
            # `blocking` makes the waiting thread sleep. By default it spins, on a core that decoding can use.
            done = self.fetch_stream.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
        return Fetched(copies, done.synchronize)


def open_staging(device: str) -> Staging:
    return HostStaging() if device == "cpu" else CudaStaging(device)


def current_device(device: str) -> AbstractContextManager[Any]:
    """Make `device` the GPU that this thread uses where none is named, which would be the first one otherwise."""
    return nullcontext() if device == "cpu" else torch.cuda.device(device)
