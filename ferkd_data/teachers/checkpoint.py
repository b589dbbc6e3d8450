"""Load weights from a local file, safetensors or PyTorch, without running code from it.

Training scripts wrap the weights: in a dictionary beside the optimiser, under a prefix of DDP, torch.compile or
Lightning, averaged (EMA) beside plain. The files of timm, torchvision's references and Lightning are supported.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ferkd_data import extras
from ferkd_data.errors import TeacherError
from ferkd_data.storage import expanded

WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
)
"""Keys under which training scripts store the weights. The first one present is taken: averaged weights come first."""
COMPILED = "_orig_mod."
"""Segment that torch.compile adds to names, at any depth."""
IRRELEVANT = ("num_batches_tracked", "n_averaged")
"""Counters of the training, which change no answer; older files lack the first."""
NAMES_SHOWN = 3


class Inert:
    """Placeholder for any object that a file holds beside its tensors. Creating it runs no code from the file."""

    def __new__(cls, *arguments: Any, **options: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_checkpoint(module: nn.Module, path: Path, *, teacher: str) -> None:
    """Load all weights of `module` from `path`.

    Raises TeacherError for a file that cannot be read safely, for missing or unexpected keys, and for wrong shapes.
    """
    path = expanded(path)
    # A dictionary of references: the module's own tensors are replaced by `load_state_dict` alone, after every check.
    wanted = module.state_dict()
    state = _fitting(_unwrapped(_read(path, teacher), path, teacher), wanted, path, teacher)
    for name, value in wanted.items():
        # Counters that an older file lacks keep the model's values.
        given = state.setdefault(name, value)
        if isinstance(given, Inert) or isinstance(given, Tensor) != isinstance(value, Tensor):
            raise TeacherError(f"teacher {teacher}: {path}: {name} is not what the model needs, {type(value).__name__}")
        if isinstance(value, Tensor) and given.shape != value.shape:
            raise TeacherError(
                f"teacher {teacher}: {path}: {name} has shape {tuple(given.shape)}, the model needs "
                f"{tuple(value.shape)}{_advice(name, given, value)}"
            )
        is_number = isinstance(value, Tensor) and not name.endswith(IRRELEVANT)
        # PyTorch would take quantised weights for the numbers that they stand for, without their scale.
        if is_number and given.is_floating_point() != value.is_floating_point():
            raise TeacherError(
                f"teacher {teacher}: {path}: {name} is of type {given.dtype}, the model needs {value.dtype}; give a "
                "file that is not quantised"
            )
    module.load_state_dict(state)


def _read(path: Path, teacher: str) -> Any:
    if not path.is_file():
        raise TeacherError(f"teacher {teacher}: no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            safetensors = extras.require("safetensors.torch", extra="timm", what_for=f"the checkpoint {path}")
            return safetensors.load_file(str(path))
        return _load_pickle(path)
    except pickle.UnpicklingError as error:
        raise TeacherError(
            f"teacher {teacher}: {path} holds more than tensors, and reading it could run code; "
            "save its state_dict alone, best as .safetensors"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise TeacherError(f"teacher {teacher}: {path} cannot be read as a checkpoint: {error}") from error
    except Exception as error:
        # safetensors' own error class derives from Exception alone, and the package may not be installed.
        if type(error).__module__.startswith("safetensors"):
            raise TeacherError(f"teacher {teacher}: {path} cannot be read as a checkpoint: {error}") from error
        raise


def _load_pickle(path: Path) -> Any:
    """Read a PyTorch file with `weights_only`; other objects, such as the training's arguments, become placeholders.

    Raises UnpicklingError for an object that cannot be replaced, and before PyTorch 2.6 for any such object.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # PyTorch 2.6 and later.
        list_others = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
        try:
            others = list_others(path) if list_others else []
        except (ValueError, RuntimeError, pickle.UnpicklingError):
            others = []
        if not others:
            raise
    # Each name that the file would import stands for Inert, whose methods do nothing. PyTorch's reader still builds no
    # other object.
    with torch.serialization.safe_globals([(Inert, name) for name in others]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrapped(content: Any, path: Path, teacher: str) -> dict[str, Any]:
    """Find the innermost dictionary that holds the weights, and drop torch.compile's segments from its names."""
    while isinstance(content, Mapping):
        # Wrappers nest: Lightning and EMA each add one.
        wrapped = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not wrapped:
            break
        # An entry for averaged weights may hold none, but only how they are to be made.
        content = next(filter(_holds_tensors, wrapped), wrapped[0])
    if isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values()):
        return {str(name).replace(COMPILED, ""): value for name, value in content.items()}
    if isinstance(content, Inert) or (
        isinstance(content, Mapping) and any(isinstance(v, Inert) for v in content.values())
    ):
        raise TeacherError(
            f"teacher {teacher}: {path} holds no state_dict of tensors, only objects whose making could run code; save "
            "the model's state_dict alone, best as .safetensors"
        )
    raise TeacherError(f"teacher {teacher}: {path} holds no state_dict of tensors")


def _holds_tensors(content: Any) -> bool:
    """Return whether a tensor is in nested dictionaries and lists."""
    if isinstance(content, Mapping):
        return any(map(_holds_tensors, content.values()))
    return any(map(_holds_tensors, content)) if isinstance(content, (list, tuple)) else isinstance(content, Tensor)


def _fitting(state: dict[str, Any], wanted: Mapping[str, Any], path: Path, teacher: str) -> dict[str, Any]:
    """Return the entries for `wanted` under the model's names. Raises TeacherError for missing and unexpected ones."""
    needed = [name for name in wanted if not name.endswith(IRRELEVANT)]
    prefix = _prefix(state, needed, path, teacher)
    missing = [name for name in needed if prefix + name not in state]
    # Entries outside the prefix are not the model's: a loss, metrics.
    ours = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    unexpected = [name for name in ours if name not in wanted and not name.endswith(IRRELEVANT)]
    if missing or unexpected:
        raise TeacherError(
            f"teacher {teacher}: {path} is not a checkpoint of this model: "
            f"missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    return {name: value for name, value in ours.items() if name in wanted}


def _prefix(state: Mapping[str, Any], needed: list[str], path: Path, teacher: str) -> str:
    """Find the prefix of the model's names, such as `module.` or `model.`; empty where none fits better.

    Raises TeacherError where several prefixes hold the whole model, with different weights.
    """
    if not needed or all(name in state for name in needed):
        return ""
    # A prefix of the whole model stands before every name, so before this one too: few candidates remain.
    last = needed[-1]
    candidates = {name[: -len(last)] for name in state if name.endswith(f".{last}")}
    whole = sorted(prefix for prefix in candidates if all(prefix + name in state for name in needed))
    different = [prefix for prefix in whole if not _same(state, whole[0], prefix, needed)]
    if different:
        raise TeacherError(
            f"teacher {teacher}: {path} holds this model under {whole[0]!r} and, with other weights, under "
            f"{different[0]!r}; save the state_dict of the right one alone"
        )
    if whole:
        return whole[0]
    # No prefix holds everything: that of the most names gives the most useful message.
    hits = {prefix: sum(prefix + name in state for name in needed) for prefix in ["", *sorted(candidates)]}
    return max(hits, key=lambda prefix: hits[prefix])


def _same(state: Mapping[str, Any], one: str, other: str, names: Iterable[str]) -> bool:
    return all(torch.equal(state[one + name], state[other + name]) for name in names)


def _advice(name: str, given: Tensor, wanted: Tensor) -> str:
    """Suggest an option where the shapes differ as those of another number of classes or another size do."""
    if given.shape[1:] == wanted.shape[1:] and given.ndim in (1, 2, 4):
        return f"; was it trained with another number of classes? Then add the option ?classes={given.shape[0]}"
    if "pos" in name:
        return "; was it trained at another size? Then add the option size"
    return ""


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{len(names)} keys ({shown}{', …' if len(names) > NAMES_SHOWN else ''})" if names else "none"
