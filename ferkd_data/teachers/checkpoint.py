"""Weights from a local file: safetensors, or a PyTorch file read with `weights_only=True` (no code can run)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ferkd_data import extras
from ferkd_data.errors import TeacherError

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which training scripts keep the weights; the first one present is taken."""
NAMES_SHOWN = 3


def load_checkpoint(module: nn.Module, path: Path, *, teacher: str) -> None:
    """Load the weights in `path` into `module`, every one of them.

    Raises TeacherError for a file that cannot be read safely, missing or unexpected keys, and wrong shapes.
    """
    state = {name.removeprefix("module."): value for name, value in _read(path, teacher).items()}
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    if missing or unexpected:
        raise TeacherError(
            f"teacher {teacher}: {path} is not a checkpoint of this model: "
            f"missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise TeacherError(
                f"teacher {teacher}: {path}: {name} has shape {tuple(state[name].shape)}, the model needs "
                f"{tuple(tensor.shape)}; was it trained with another number of classes?"
            )
    module.load_state_dict(state)


def _read(path: Path, teacher: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise TeacherError(f"teacher {teacher}: no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            safetensors = extras.require("safetensors.torch", extra="timm", what_for=f"the checkpoint {path}")
            content: Any = safetensors.load_file(str(path))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
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
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise TeacherError(f"teacher {teacher}: {path} holds no state_dict of tensors")
    return content


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{len(names)} keys ({shown}{', …' if len(names) > NAMES_SHOWN else ''})" if names else "none"
