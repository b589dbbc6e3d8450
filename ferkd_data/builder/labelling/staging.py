"""Between host and device: pixels up and answers down, without either waiting for the other.

Crops are cut on a stream of their own while the teachers are busy on theirs. Uploads come out of pinned memory, answers
go to pinned memory on a third stream; events tell who may go on. On a CPU all of it is a pass-through, so that the loop
is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

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
