"""Teachers that the builder brings: `torchscript:FILE` and `python:package.module:factory`.

Both run the builder's own code. A `python:` factory takes no arguments and returns an `nn.Module` from normalised
float (B, 3, S, S) to logits (B, C); a dict attribute `preprocessing` on it (size, mean, std, interpolation) is read.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ferkd_data.errors import FerkdError, TeacherError
from ferkd_data.storage import sha256_file
from ferkd_data.teachers.checkpoint import load_checkpoint
from ferkd_data.teachers.spec import TeacherSpec
from ferkd_data.teachers.teacher import ModuleTeacher, Precision, preprocessing_of, state_digest

KNOWN = ("size", "interpolation", "mean", "std")


def load_torchscript(spec: TeacherSpec, *, device: str, precision: Precision) -> ModuleTeacher:
    path = Path(spec.name)
    if not path.is_file():
        raise TeacherError(f"teacher {spec}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.*")
            module: Any = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise TeacherError(f"teacher {spec}: not a TorchScript file: {str(error).splitlines()[0]}") from error
    return ModuleTeacher(
        module, spec, preprocessing_of(spec), digest=sha256_file(path), device=device, precision=precision
    )


def load_python(spec: TeacherSpec, *, device: str, precision: Precision) -> ModuleTeacher:
    module = _make(spec)
    if spec.checkpoint is not None:
        load_checkpoint(module, Path(spec.checkpoint), teacher=str(spec))
    known = getattr(module, "preprocessing", None) or {}
    unknown = set(known) - set(KNOWN)
    if unknown:
        raise TeacherError(f"teacher {spec}: its preprocessing has unknown entries {sorted(unknown)}; known: {KNOWN}")
    return ModuleTeacher(
        module,
        spec,
        preprocessing_of(spec, **known),
        digest=state_digest(module.state_dict()),
        device=device,
        precision=precision,
    )


def _make(spec: TeacherSpec) -> nn.Module:
    package, colon, factory = spec.name.partition(":")
    if not colon:
        raise TeacherError(f"teacher {spec}: must be python:package.module:factory")
    if "" not in sys.path:
        # As with `python -m`: a teacher in the working directory needs no installation.
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(package), factory)
    except ModuleNotFoundError as error:
        raise TeacherError(f"teacher {spec}: {error}; is it installed, or in the working directory?") from error
    except AttributeError as error:
        raise TeacherError(f"teacher {spec}: module {package} has no {factory}") from error
    try:
        module = function()
    except FerkdError:
        raise
    except Exception as error:
        # The builder's own code, which may raise anything.
        raise TeacherError(f"teacher {spec}: {factory}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise TeacherError(f"teacher {spec}: {factory}() gave a {type(module).__name__}, expected an nn.Module")
    return module
