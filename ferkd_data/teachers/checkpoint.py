"""Weights from a local file: safetensors, or a PyTorch file, of which no code can run.

Training scripts wrap the weights: in a dictionary beside the optimiser, under a prefix of DDP, torch.compile or
Lightning, averaged (EMA) beside plain. What timm, torchvision's references, Lightning and the like write is understood.
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
"""Keys under which training scripts keep the weights; the first one present is taken, averaged weights before plain."""
COMPILED = "_orig_mod."
"""A segment that torch.compile adds to names, at any depth."""
IRRELEVANT = ("num_batches_tracked", "n_averaged")
"""Counters of training, which change no answer; older files lack the first."""
NAMES_SHOWN = 3


class Inert:
    """Stands for any object that a file holds beside its tensors; making one runs no code of the file's."""

    def __new__(cls, *arguments: Any, **options: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_checkpoint(module: nn.Module, path: Path, *, teacher: str) -> None:
    """Load the weights in `path` into `module`, every one of them.

    Raises TeacherError for a file that cannot be read safely, missing or unexpected keys, and wrong shapes.
    """
    path = path.expanduser()
    wanted = module.state_dict()
    state = _fitting(_unwrapped(_read(path, teacher), path, teacher), wanted, path, teacher)
    for name, value in wanted.items():
        given = state.setdefault(name, value)
        if isinstance(given, Inert) or isinstance(given, Tensor) != isinstance(value, Tensor):
            raise TeacherError(f"teacher {teacher}: {path}: {name} is not what the model needs, {type(value).__name__}")
        if isinstance(value, Tensor) and given.shape != value.shape:
            raise TeacherError(
                f"teacher {teacher}: {path}: {name} has shape {tuple(given.shape)}, the model needs "
                f"{tuple(value.shape)}{_advice(name, given, value)}"
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
        # safetensors raises a class of its own, which derives from Exception alone.
        if type(error).__module__.startswith("safetensors"):
            raise TeacherError(f"teacher {teacher}: {path} cannot be read as a checkpoint: {error}") from error
        raise


def _load_pickle(path: Path) -> Any:
    """PyTorch's reader of tensors alone; other objects, such as the arguments of the training, become inert.

    Raises UnpicklingError for objects that cannot be left out, and for all of them before PyTorch 2.6.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        list_others = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
        try:
            others = list_others(path) if list_others else []
        except (ValueError, RuntimeError, pickle.UnpicklingError):
            others = []
        if not others:
            raise
    with torch.serialization.safe_globals([(Inert, name) for name in others]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrapped(content: Any, path: Path, teacher: str) -> dict[str, Any]:
    """The innermost dictionary that holds the weights."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
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


def _fitting(state: dict[str, Any], wanted: Mapping[str, Any], path: Path, teacher: str) -> dict[str, Any]:
    """The entries for `wanted`, under its own names. Raises TeacherError for any that is missing or too many."""
    needed = [name for name in wanted if not name.endswith(IRRELEVANT)]
    prefix = _prefix(state, needed, path, teacher)
    missing = [name for name in needed if prefix + name not in state]
    # Beside a model under a prefix, a file may hold others: a loss, metrics.
    ours = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    unexpected = [name for name in ours if name not in wanted and not name.endswith(IRRELEVANT)]
    if missing or unexpected:
        raise TeacherError(
            f"teacher {teacher}: {path} is not a checkpoint of this model: "
            f"missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    return {name: value for name, value in ours.items() if name in wanted}


def _prefix(state: Mapping[str, Any], needed: list[str], path: Path, teacher: str) -> str:
    """The text before the model's names, such as `module.` or `model.`; empty where nothing fits better."""
    if not needed or all(name in state for name in needed):
        return ""
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
    hits = {prefix: sum(prefix + name in state for name in needed) for prefix in ["", *sorted(candidates)]}
    return max(hits, key=lambda prefix: hits[prefix])


def _same(state: Mapping[str, Any], one: str, other: str, names: Iterable[str]) -> bool:
    return all(torch.equal(state[one + name], state[other + name]) for name in names)


def _advice(name: str, given: Tensor, wanted: Tensor) -> str:
    """Whether the shapes differ as those of a head for another number of classes do."""
    if given.shape[1:] == wanted.shape[1:] and given.ndim in (1, 2, 4):
        return f"; was it trained with another number of classes? Then add the option ?classes={given.shape[0]}"
    if "pos" in name:
        return "; was it trained at another size? Then add the option size"
    return ""


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{len(names)} keys ({shown}{', …' if len(names) > NAMES_SHOWN else ''})" if names else "none"
