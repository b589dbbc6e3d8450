"""A GPU that only exists in the types of tensors, to run what is meant for a real one on any machine.

PyTorch's FakeTensorMode gives tensors a device, a shape and a dtype, but no contents: operators that mix devices raise,
and so does whatever asks for a value (`.item()`, `if tensor:`, boolean indexing), for which a real GPU would make the
host wait. It is only half public (`torch._subclasses`); without a GPU nothing better is to be had. What it cannot show:
wrong numbers, races between streams, memory and time.

Tensors of the CPU stay real. `FakeGpu` also writes down the copies that make the host wait, and counts the kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

VIEWS = (
    "view",
    "_unsafe_view",
    "permute",
    "t",
    "transpose",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "expand",
    "alias",
)
VIEWS += ("detach", "unbind", "split", "as_strided", "empty", "empty_like", "new_empty", "lift_fresh")
"""Operators that start no kernel."""


class FakeGpu(TorchDispatchMode):
    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.waits: list[str] = []
        """Copies between host and device for which the host waits, until the device has done what was queued before."""
        self.kernels: Counter[str] = Counter()
        self.pageable_bytes = 2**16
        """Up to so much of pageable memory, CUDA takes over at once; for more, the host waits until it is copied."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if torch.device(kwargs.get("device") or "cpu").type == "cpu" and not any(map(is_fake, given)):
            with unset_fake_temporarily():
                return operator(*args, **kwargs)
        args, kwargs = tree_map(self._faked, (args, kwargs))
        out = operator(*args, **kwargs)
        name = operator.overloadpacket.__name__
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name == "to" and (out.dtype, out.device) == (args[0].dtype, args[0].device):
            return out
        kinds = {tensor.device.type for tensor in (*given, *made) if tensor.dim() or name in ("_to_copy", "copy_")}
        if (
            name not in VIEWS
            and {"cpu", "cuda"} <= kinds
            and not (kwargs.get("non_blocking") or (name == "copy_" and True in args[2:]))
        ) or (name in ("_to_copy", "copy_") and self._is_pageable(given, made)):
            self.waits.append(name)
        if any(tensor.device.type == "cuda" for tensor in made) and name not in VIEWS:
            self.kernels[name] += 1
        return out

    def _is_pageable(self, given: list[Tensor], made: list[Tensor]) -> bool:
        """Whether a copy to the device reads much memory that is not page-locked."""
        source = given[-1]
        to_device = source.device.type == "cpu" and made[0].device.type == "cuda"
        return to_device and source.nbytes > self.pageable_bytes and not hasattr(source, "pinned")

    def _faked(self, leaf: Any) -> Any:
        return self.fake.from_tensor(leaf) if isinstance(leaf, Tensor) and not is_fake(leaf) else leaf


@contextmanager
def open_fake_gpu() -> Iterator[FakeGpu]:
    """After `pretend_cuda`, there is one, called cuda. Modules made before can be moved to it."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, FakeGpu(fake) as gpu:
        yield gpu


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for the hardware is answered as on an H100; streams, events and pinned memory do nothing."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *ignored: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *ignored, **also: _Nothing())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: ExitStack())
    monkeypatch.setattr(Tensor, "pin_memory", _pinned)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, *, pin_memory=False, **how: empty_like(tensor, **how))


def _pinned(tensor: Tensor) -> Tensor:
    pinned = tensor.detach()
    pinned.pinned = True
    return pinned


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


class _Nothing:
    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *ignored: self


class StreamRecorder:
    """Stands for a stream or an event, and writes down what it is told."""

    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def __getattr__(self, call: str) -> Callable[..., Any]:
        def told(*others: Any) -> Any:
            self.log.append((self.name, call, *(getattr(other, "name", other) for other in others)))
            return others[0] if call == "record_event" and others else StreamRecorder(f"event of {self.name}", self.log)

        return told
