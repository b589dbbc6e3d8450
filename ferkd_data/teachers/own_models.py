"""The user's own teachers: `torchscript:FILE` and `python:package.module:factory`.

Both run the user's code. A `python:` factory takes no arguments and returns an `nn.Module` from normalised float
(B, 3, S, S) to logits (B, C). A dict attribute `preprocessing` of the module (size, mean, std, interpolation) is read.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ferkd_data.errors import FerkdError, TeacherError
from ferkd_data.storage import expanded, sha256_file
from ferkd_data.teachers.checkpoint import load_checkpoint
from ferkd_data.teachers.digest import module_digest, weights_digest
from ferkd_data.teachers.module_teacher import ModuleTeacher, weights_do_not_fit
from ferkd_data.teachers.spec import TeacherSpec, preprocessing_of
from ferkd_data.teachers.teacher import Precision, is_out_of_memory, reason, refuse_failed_device

KNOWN = ("size", "interpolation", "mean", "std", "crop_pct")
_given: WeakKeyDictionary[nn.Module, tuple[TeacherSpec, str]] = WeakKeyDictionary()
"""The modules that factories gave in this process and that are alive, with the spec and weights' digest of each."""


def load_torchscript(spec: TeacherSpec, *, device: str, precision: Precision) -> ModuleTeacher:
    """Load a TorchScript file. Raises TeacherError."""
    path = expanded(spec.name)
    if not path.is_file():
        raise TeacherError(f"teacher {spec}: no such file")
    try:
        with warnings.catch_warnings():
            # PyTorch announces the end of TorchScript at every load; the user of a finished file can do nothing about
            # it.
            warnings.filterwarnings("ignore", message=".*torch.jit.*")
            module: Any = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise weights_do_not_fit(spec, device) from error
        refuse_failed_device(device, error, spec)
        raise TeacherError(f"teacher {spec}: not a TorchScript file: {str(error).splitlines()[0]}") from error
    return ModuleTeacher(
        module, spec, preprocessing_of(spec), digest=sha256_file(path), device=device, precision=precision
    )


def load_python(spec: TeacherSpec, *, device: str, precision: Precision) -> ModuleTeacher:
    """Import a module and call its factory. Raises TeacherError."""
    module = _make(spec)
    if spec.checkpoint is not None:
        load_checkpoint(module, Path(spec.checkpoint), teacher=str(spec))
    known = getattr(module, "preprocessing", None) or {}
    if not isinstance(known, Mapping) or set(known) - set(KNOWN):
        raise TeacherError(
            f"teacher {spec}: the attribute preprocessing of its module must be a dict with entries among "
            f"{', '.join(KNOWN)}, got {sorted(map(str, known)) if isinstance(known, Mapping) else type(known).__name__}"
        )
    # First, since it raises an error that explains weights that cannot be read.
    digest = module_digest(module, spec)
    _check_alone(module, spec)
    _given[module] = spec, weights_digest(module)
    return ModuleTeacher(
        module,
        spec,
        preprocessing_of(spec, **known),
        digest=digest,
        device=device,
        precision=precision,
    )


def _check_alone(module: nn.Module, spec: TeacherSpec) -> None:
    """Raise TeacherError where another teacher's network was given again, and now has other weights than it had.

    Both teachers would answer as the later one. A network that is kept and never changed may be given several times.
    The module is not copied instead: what refers to the old one, as a function in an attribute may, would stay there.
    """
    parts = {id(part) for part in module.modules()}
    for other, (before, digest) in list(_given.items()):
        if parts.isdisjoint(id(part) for part in other.modules()):
            continue
        keeps_a_checkpoint = before.checkpoint is not None and spec.checkpoint is None
        if keeps_a_checkpoint or weights_digest(other) != digest:
            raise TeacherError(
                f"teacher {spec}: its factory gave a network that teacher {before} has already, and the two have "
                "different weights; return a new one from each call (without a cache or a global variable)"
            )


def _make(spec: TeacherSpec) -> nn.Module:
    package, colon, factory = spec.name.partition(":")
    if not colon:
        raise TeacherError(f"teacher {spec}: must be python:package.module:factory")
    if "" not in sys.path:
        # As with `python -m`, so that a teacher in the working directory needs no installation.
        sys.path.insert(0, "")
    try:
        source = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise TeacherError(f"teacher {spec}: {error}; is it installed, or in the working directory?") from error
    except (Exception, SystemExit) as error:
        # The user's own code, here and below, may raise anything.
        raise TeacherError(f"teacher {spec}: importing {package} failed: {reason(error)}") from error
    function = getattr(source, factory, None)
    if not callable(function):
        raise TeacherError(f"teacher {spec}: module {package} has no {factory}() to call")
    try:
        module = function()
    except FerkdError:
        raise
    except (Exception, SystemExit) as error:
        raise TeacherError(f"teacher {spec}: {factory}() failed: {reason(error)}") from error
    if not isinstance(module, nn.Module):
        raise TeacherError(f"teacher {spec}: {factory}() gave a {type(module).__name__}, expected an nn.Module")
    return module
