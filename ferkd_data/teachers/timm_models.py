"""Teachers from timm: `timm:NAME[@checkpoint]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ferkd_data import extras
from ferkd_data.errors import TeacherError
from ferkd_data.teachers.checkpoint import load_checkpoint
from ferkd_data.teachers.digest import module_digest
from ferkd_data.teachers.module_teacher import ModuleTeacher
from ferkd_data.teachers.spec import TeacherSpec, preprocessing_of
from ferkd_data.teachers.teacher import Precision


def load(spec: TeacherSpec, *, device: str, precision: Precision) -> ModuleTeacher:
    """Load a timm classifier. Raises TeacherError, MissingExtraError."""
    timm = extras.require("timm", extra="timm", what_for=f"teacher {spec}")
    module = _make(timm, spec)
    if spec.checkpoint is not None:
        load_checkpoint(module, Path(spec.checkpoint), teacher=str(spec))
    if getattr(module, "num_classes", None) == 0:
        raise TeacherError(f"teacher {spec}: this model gives features and has no classifier; choose one that has")
    config = timm.data.resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise TeacherError(f"teacher {spec}: takes {channels}x{height}x{width} input; only square RGB is supported")
    preprocessing = preprocessing_of(
        spec,
        size=height,
        # "random" is what some models were trained with; how to evaluate them is open, so the default is taken.
        interpolation=None if config["interpolation"] == "random" else config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
    )
    return ModuleTeacher(
        module,
        spec,
        preprocessing,
        digest=module_digest(module, spec),
        device=device,
        precision=precision,
        # timm tells the subset by the number of classes.
        class_names=imagenet_names() if timm.data.infer_imagenet_subset(module) == "imagenet-1k" else None,
    )


def _make(timm: Any, spec: TeacherSpec) -> nn.Module:
    """Create the model, with a head of `classes` outputs where a checkpoint fills it. Raises TeacherError."""
    options: dict[str, Any] = {}
    if spec.checkpoint is not None and spec.classes is not None:
        options["num_classes"] = spec.classes
    # Convolutional networks take any size and refuse the argument; position embeddings have to be resized.
    if spec.size is not None and _has_fixed_size(timm, spec.name):
        options["img_size"] = spec.size
    try:
        module: nn.Module = timm.create_model(spec.name, pretrained=spec.checkpoint is None, **options)
    except OSError as error:
        raise TeacherError(
            f"teacher {spec}: its pretrained weights cannot be fetched from the hub ({type(error).__name__}); "
            f"give a local file: timm:{spec.name}@FILE.safetensors"
        ) from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise TeacherError(f"teacher {spec}: timm cannot make this model: {error}") from error
    return module


def _has_fixed_size(timm: Any, name: str) -> bool:
    """Return whether the model is made for one input size, like vision transformers with learned positions."""
    try:
        config = timm.get_pretrained_cfg(name)
    except (RuntimeError, ValueError):
        # Not a model of timm's own; `create_model` tells a model on a hub from a wrong name.
        return False
    return bool(getattr(config, "fixed_input_size", False))


def imagenet_names() -> tuple[str, ...]:
    """Return the names of ImageNet-1k's 1,000 classes in the usual order."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
