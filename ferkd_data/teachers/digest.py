"""Digest teachers: models with different weights, structure or hyperparameters have different digests.

The digest covers weights and buffers (persistent or not, quantised or not) with names, dtypes and shapes, the classes
of all submodules, and their plain attributes: numbers, texts, tensors outside the state, containers of these, and
functions by name. It does not cover code and global variables, so that a teacher whose code failed at 90 % of a build
can be mended and the build resumed. For the same reason the class of the outermost module counts only where it belongs
to one of `LIBRARIES`. Input size, normalisation and precision are not covered either: builds compare them separately.
"""

from __future__ import annotations

import argparse
import enum
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ferkd_data import extras
from ferkd_data.errors import TeacherError
from ferkd_data.teachers.spec import TeacherSpec

MACHINERY = frozenset(nn.Module().__dict__)
"""Attributes that every module has; parameters, buffers and submodules are covered by their own names."""
ORIGINS = frozenset(
    {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "pretrained_cfg", "default_cfg"}
)
"""Attributes that say where a model came from, not what it computes."""
LIBRARIES = frozenset({"torch", "torchvision", "timm", "transformers", "open_clip"})
"""Packages whose private attributes are left out: they change between versions while the model stays the same."""
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
NAMESPACES = (argparse.Namespace, types.SimpleNamespace)
READ_BYTES = 1 << 20


def module_digest(module: nn.Module, spec: TeacherSpec) -> str:
    """Compute the SHA-256 of a module that has not run yet; equal in every process that makes the same module.

    Raises TeacherError for weights that cannot be read, such as those of a module on the meta device.
    """
    total = hashlib.sha256()
    try:
        walk = _Walk(total.update)
        # Every field ends with NUL, so that different fields never give the same bytes.
        for name, submodule in module.named_modules(remove_duplicate=False):
            kind = type(submodule).__qualname__ if name or _top(type(submodule)) in LIBRARIES else ""
            total.update(f"module\0{name}\0{kind}\0".encode())
            walk.attributes(submodule)
            total.update(_code(submodule).encode())
        for name, tensor in _tensors(module):
            total.update(f"tensor\0{name}\0".encode())
            _add_tensor(total.update, tensor)
        for name, value in sorted(_extra_state(module)):
            total.update(f"state\0{name}\0".encode())
            walk.value(value)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise TeacherError(
            f"teacher {spec}: its weights cannot be read ({str(error).splitlines()[0]}); is every parameter loaded?"
        ) from error
    return total.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Compute the SHA-256 of a module's weights alone: the same before and after it ran, unlike `module_digest`."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            total.update(f"{name}\0".encode())
            _add_tensor(total.update, value)
    return total.hexdigest()


def with_choices(digest: str, spec: TeacherSpec) -> str:
    """Extend a digest by the spec's options that change the answers of the same weights."""
    choices = [f"{name}={getattr(spec, name)}" for name in ("output", "activation") if getattr(spec, name) is not None]
    return hashlib.sha256("\0".join([digest, *choices]).encode()).hexdigest() if choices else digest


def onnx_digest(path: Path, spec: TeacherSpec) -> str:
    """Compute the SHA-256 of an ONNX file and of its weights that are stored in other files.

    Raises TeacherError where such a file is missing, MissingExtraError without the package onnx.
    """
    total = hashlib.sha256()
    _add_range(total.update, path, 0, None)
    for location, offset, length in _external_data(path, spec):
        file = path.parent / location
        if not file.is_file():
            raise TeacherError(
                f"teacher {spec}: its weights are in {file}, which is not there; copy it beside the model"
            )
        total.update(f"external\0{location}\0{offset}\0{length}\0".encode())
        _add_range(total.update, file, offset, length)
    return total.hexdigest()


def _external_data(path: Path, spec: TeacherSpec) -> list[tuple[str, int, int | None]]:
    """List (file, offset, length) of each tensor outside the model file, also of subgraphs and functions."""
    # ONNX Runtime's own format is one flatbuffer, which the package onnx does not read.
    if path.suffix == ".ort":
        return []
    onnx = extras.require("onnx", extra="onnx", what_for=f"teacher {spec}")
    extras.require("onnx.external_data_helper", extra="onnx", what_for=f"teacher {spec}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        # protobuf's DecodeError derives from Exception alone.
        if type(error).__name__ != "DecodeError":
            raise
        raise TeacherError(f"teacher {spec}: not an ONNX file: {error}") from error
    found = []
    for tensor in _tensor_messages(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = onnx.external_data_helper.ExternalDataInfo(tensor)
            found.append((info.location, int(info.offset or 0), int(info.length) if info.length else None))
    return found


def _tensor_messages(message: Any) -> Iterable[Any]:
    """Yield every TensorProto in a protobuf message, wherever the schema allows one."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        children = value if isinstance(value, Iterable) else [value]
        for child in children:
            yield from _tensor_messages(child)


def _add_range(update: Callable[[bytes], None], path: Path, offset: int, length: int | None) -> None:
    with path.open("rb") as file:
        file.seek(offset)
        left = length
        while left is None or left > 0:
            block = file.read(READ_BYTES if left is None else min(READ_BYTES, left))
            if not block:
                return
            update(block)
            left = None if left is None else left - len(block)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """List parameters and buffers, also non-persistent ones; a tensor with two names is listed twice."""
    named = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return sorted(named.items())


def _extra_state(module: nn.Module) -> list[tuple[str, Any]]:
    """List entries of the state_dict that are neither parameters nor buffers, such as weights of quantised modules."""
    known = {name for name, _ in _tensors(module)}
    return [(name, value) for name, value in module.state_dict().items() if name not in known]


def _add_tensor(update: Callable[[bytes], None], tensor: Tensor) -> None:
    tensor = tensor.detach()
    update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0{tensor.layout}\0".encode())
    # Tensor subclasses, such as quantised weights of torchao, are made of plain tensors.
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        update(f"{type(tensor).__qualname__}\0{context}\0".encode())
        for name in names:
            _add_tensor(update, getattr(tensor, name))
    elif tensor.is_quantized:
        update(f"{tensor.qscheme()}\0".encode())
        _add_tensor(update, tensor.int_repr())
        if tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
            update(f"{tensor.q_per_channel_axis()}\0".encode())
            _add_tensor(update, tensor.q_per_channel_scales())
            _add_tensor(update, tensor.q_per_channel_zero_points())
        else:
            update(f"{tensor.q_scale()!r}\0{tensor.q_zero_point()}\0".encode())
    elif tensor.layout != torch.strided:
        dense = tensor.to_dense()
        _add_tensor(update, dense)
    else:
        # Conjugation and negation may be pending flags on the same bytes.
        plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())


class _Walk:
    """Feed values of any type to a hash, in an order that does not depend on the process; each object once."""

    def __init__(self, update: Callable[[bytes], None]) -> None:
        self.update = update
        self.seen: dict[int, Any] = {}
        """Objects by id. Holding them keeps Python from reusing their ids."""

    def attributes(self, module: nn.Module) -> None:
        self.seen[id(module)] = module
        from_library = _top(type(module)) in LIBRARIES
        for name, value in sorted(vars(module).items()):
            if name in MACHINERY or name in ORIGINS or (from_library and name.startswith("_")):
                continue
            self.update(f"{name}\0".encode())
            self.value(value)
        # Hooks change answers too, and MACHINERY leaves out the dictionaries that hold them.
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            self.value(hook)

    def value(self, value: Any) -> None:
        self.update(f"{type(value).__qualname__}\0".encode())
        if value is None or isinstance(value, PLAIN):
            self.update(f"{value!r}\0".encode())
        # Once, so that objects that refer to each other come to an end; plain values above are their own identity.
        elif id(value) not in self.seen:
            self.seen[id(value)] = value
            self._add(value)

    def _add(self, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self.update(f"{value.name}\0".encode())
        elif isinstance(value, Tensor):
            _add_tensor(self.update, value)
        elif isinstance(value, np.ndarray) and value.dtype.kind != "O":
            self.update(f"{value.dtype}\0{value.shape}\0".encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, np.generic):
            self.update(f"{value.item()!r}\0".encode())
        elif isinstance(value, Mapping):
            self._pairs(value.items())
        elif isinstance(value, (set, frozenset)):
            self._pairs((item, None) for item in value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.value(item)
        elif isinstance(value, nn.Module):
            # A module in a list or dict, where PyTorch does not find it. Registered modules are walked by name.
            self.attributes(value)
            for name, tensor in _tensors(value):
                self.update(f"{name}\0".encode())
                _add_tensor(self.update, tensor)
        else:
            self._add_object(value)

    def _add_object(self, value: Any) -> None:
        """Feed a partial, class, function or plain object; for anything else, such as a file, the type alone counts."""
        if isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.value(part)
        elif isinstance(value, type):
            self.update(f"{value.__qualname__}\0".encode())
        elif callable(value) and hasattr(value, "__qualname__"):
            self._function(value)
        elif isinstance(value, NAMESPACES) or (hasattr(value, "__dict__") and not _is_of_the_system(type(value))):
            self._pairs((name, item) for name, item in vars(value).items() if name not in ORIGINS)

    def _function(self, function: Any) -> None:
        """Feed a function's name and the values bound to it: its defaults and the variables of its closure."""
        self.update(f"{function.__qualname__}\0".encode())
        plain = inspect.unwrap(getattr(function, "__func__", function))
        self.value(getattr(plain, "__defaults__", None))
        # Two closures of one function answer differently where they hold other values.
        for cell in getattr(plain, "__closure__", None) or ():
            self.value(_content(cell))

    def _pairs(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        # By name alone: sets come in another order in each process, and values need not be comparable.
        for key, value in sorted(((_name(key), value) for key, value in pairs), key=lambda pair: pair[0]):
            self.update(f"{key}\0".encode())
            self.value(value)


def _name(key: Any) -> str:
    return str(key) if key is None or isinstance(key, PLAIN) else getattr(key, "__qualname__", type(key).__qualname__)


def _top(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _is_of_the_system(cls: type) -> bool:
    """Recognise a class of Python or PyTorch: locks, loggers, streams and the like differ from run to run."""
    return _top(cls) == "torch" or _top(cls) in sys.stdlib_module_names


def _content(cell: Any) -> Any:
    """Return the value of a closure's cell; None for an empty one."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _code(module: nn.Module) -> str:
    """Return the program of a TorchScript or FX module, whose Python class does not tell what it computes."""
    if isinstance(module, torch.jit.ScriptModule) and not hasattr(module, "forward"):
        return ""
    code = getattr(module, "code", "") if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)) else ""
    return str(code)
