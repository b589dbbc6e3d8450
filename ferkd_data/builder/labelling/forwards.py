"""Asking a teacher: with smaller batches where the device runs out of memory, and its errors under its name.

Legend: B crops of a batch, C classes, S output side.

Between host and device: pixels up and answers down, without either waiting for the other.

Crops are cut on a stream of their own while the teachers are busy on theirs. Uploads come out of pinned memory, answers
go to pinned memory on a third stream; events tell who may go on. On a CPU all of it is a pass-through, so that the loop
is the same.
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
from ferkd_data.teachers import Teacher
from ferkd_data.teachers.teacher import is_out_of_memory


class Observer(Protocol):
    """Whoever wants to know what the teachers are at; called in the thread that asks them."""

    def asking(self, teacher: str) -> None:
        """The process now waits for this teacher."""

    def answered(self) -> None:
        """It does not any more."""

    def halved(self, teacher: str, crops: int) -> None:
        """The device ran out of memory; the teacher now gets `crops` at a time."""


class Nobody:
    def asking(self, teacher: str) -> None:
        pass

    def answered(self) -> None:
        pass

    def halved(self, teacher: str, crops: int) -> None:
        pass


@dataclass(kw_only=True)
class Forwards:
    observer: Observer = field(default_factory=Nobody)
    _most: dict[str, int] = field(default_factory=dict)
    """Crops that a teacher gets at a time, where that is fewer than a batch."""

    def logits(self, teacher: Teacher, images_BCSS: Tensor) -> Tensor:
        """(B, C) float32. Raises TeacherError."""
        name = str(teacher.spec)
        self.observer.asking(name)
        while (logits := self._try(teacher, images_BCSS, name)) is None:
            # Here and not where it was caught: the exception held on to the tensors of its frames.
            torch.cuda.empty_cache()
            self.observer.halved(name, self._most[name])
        return logits

    def _try(self, teacher: Teacher, images_BCSS: Tensor, name: str) -> Tensor | None:
        """None when memory ran out; the next try is then with half as many crops at a time."""
        step = min(len(images_BCSS), self._most.get(name, len(images_BCSS)))
        try:
            if step == len(images_BCSS):
                return teacher.logits(images_BCSS)
            return torch.cat([teacher.logits(part) for part in torch.split(images_BCSS, step)])
        except FerkdError:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise TeacherError(
                    f"teacher {name}: failed on {len(images_BCSS)} crops: {type(error).__name__}: {error}"
                ) from error
            if step <= 1:
                raise TeacherError(
                    f"teacher {name}: the device has too little memory for a single crop; end what else runs on it, "
                    "or use fewer --processes or teachers"
                ) from error
            self._most[name] = step // 2
            return None


Wait = Callable[[], None]


class Fetched(NamedTuple):
    """Tensors on their way to the host; not to be read before `wait` has returned."""

    tensors: list[Tensor]
    wait: Wait


class Staging(Protocol):
    on_device: bool
    """Whether crops are cut there; else the host's cutter does it."""

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """What is uploaded and computed inside is done beside the teachers' work; called in any thread."""

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        """The array on the device; the device's current stream has it in order, the host may change it at once."""

    def mark(self) -> Any:
        """Inside `cutting`, at its end: the moment for `join`."""

    def join(self, moment: Any, tensors: Sequence[Tensor]) -> None:
        """Let the teachers' stream begin with `tensors` when `moment` is reached; the host does not wait."""

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        """Begin to copy what the teachers' stream computes into host memory."""


class HostStaging:
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
    on_device = True

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.back = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @contextmanager
    def cutting(self) -> Iterator[None]:
        # One stream for all threads that cut: they take turns on the device as they do in the pipeline.
        with torch.cuda.stream(self.side):
            yield

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        # PyTorch's pinned memory is not given out again before the copy that reads it is done.
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

    def mark(self) -> Any:
        return self.side.record_event()

    def join(self, moment: Any, tensors: Sequence[Tensor]) -> None:
        teachers = torch.cuda.current_stream(self.device)
        teachers.wait_event(moment)
        for tensor in tensors:
            # They were made on the side stream, whose next crops must not take their memory too early.
            tensor.record_stream(teachers)

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        self.back.wait_stream(torch.cuda.current_stream(self.device))
        copies = []
        with torch.cuda.stream(self.back):
            for tensor in tensors:
                copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
                copies.append(copy.copy_(tensor, non_blocking=True))
                tensor.record_stream(self.back)
            # Whoever waits for it sleeps: by default a thread that waits keeps a core busy, which decoding can use.
            done = self.back.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
        return Fetched(copies, done.synchronize)


def open_staging(device: str) -> Staging:
    return HostStaging() if device == "cpu" else CudaStaging(device)


def current_device(device: str) -> AbstractContextManager[Any]:
    """For as long as it lasts, what this thread does on no GPU in particular is done on this one, not on the first."""
    return nullcontext() if device == "cpu" else torch.cuda.device(device)
