"""Teachers from timm: `timm:NAME[@checkpoint]`."""

from __future__ import annotations

from pathlib import Path

from ferkd_data import extras
from ferkd_data.errors import TeacherError
from ferkd_data.teachers.checkpoint import load_checkpoint
from ferkd_data.teachers.digest import module_digest
from ferkd_data.teachers.spec import TeacherSpec
from ferkd_data.teachers.teacher import ModuleTeacher, Precision, preprocessing_of


def load(spec: TeacherSpec, *, device: str, precision: Precision) -> ModuleTeacher:
    timm = extras.require("timm", extra="timm", what_for=f"teacher {spec}")
    try:
        module = timm.create_model(spec.name, pretrained=spec.checkpoint is None)
    except OSError as error:
        raise TeacherError(
            f"teacher {spec}: its pretrained weights cannot be fetched from the hub ({type(error).__name__}); "
            f"give a local file: timm:{spec.name}@FILE.safetensors"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise TeacherError(f"teacher {spec}: timm cannot make this model: {error}") from error
    if spec.checkpoint is not None:
        load_checkpoint(module, Path(spec.checkpoint), teacher=str(spec))
    config = timm.data.resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise TeacherError(f"teacher {spec}: takes {channels}x{height}x{width} input; only square RGB is supported")
    preprocessing = preprocessing_of(
        spec,
        size=height,
        interpolation=config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else None,
        mean=config["mean"],
        std=config["std"],
    )
    return ModuleTeacher(
        module,
        spec,
        preprocessing,
        digest=module_digest(module, spec),
        device=device,
        precision=precision,
        class_names=imagenet_names() if timm.data.infer_imagenet_subset(module) == "imagenet-1k" else None,
    )


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet-1k in the usual order, readable."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
