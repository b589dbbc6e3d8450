"""Teachers from torchvision: `torchvision:NAME[@checkpoint]`, with the weights torchvision calls DEFAULT."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import torchvision

from ferkd_data.errors import TeacherError
from ferkd_data.teachers.checkpoint import load_checkpoint
from ferkd_data.teachers.digest import module_digest
from ferkd_data.teachers.spec import TeacherSpec
from ferkd_data.teachers.teacher import ModuleTeacher, Precision, preprocessing_of


def load(spec: TeacherSpec, *, device: str, precision: Precision) -> ModuleTeacher:
    try:
        weights: Any = torchvision.models.get_model_weights(spec.name).DEFAULT
    except (ValueError, AttributeError) as error:
        raise TeacherError(f"teacher {spec}: torchvision has no classifier of this name with weights") from error
    try:
        module = torchvision.models.get_model(spec.name, weights=None if spec.checkpoint else weights)
    except (URLError, OSError) as error:
        raise TeacherError(
            f"teacher {spec}: its pretrained weights cannot be fetched ({error}); "
            f"give a local file: torchvision:{spec.name}@FILE.pth"
        ) from error
    if spec.checkpoint is not None:
        load_checkpoint(module, Path(spec.checkpoint), teacher=str(spec))
    transforms = weights.transforms()
    preprocessing = preprocessing_of(
        spec,
        size=_first(getattr(transforms, "crop_size", None)),
        interpolation=getattr(getattr(transforms, "interpolation", None), "value", None),
        mean=getattr(transforms, "mean", None),
        std=getattr(transforms, "std", None),
    )
    published = weights.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    return ModuleTeacher(
        module,
        spec,
        preprocessing,
        digest=module_digest(module, spec),
        device=device,
        precision=precision,
        class_names=tuple(weights.meta.get("categories", ())) or None,
        published_top1=None if published is None else published / 100,
    )


def _first(sizes: Any) -> int | None:
    return None if sizes is None else int(sizes[0]) if isinstance(sizes, (list, tuple)) else int(sizes)
