"""Teachers from torchvision: `torchvision:NAME[@checkpoint]`; without a checkpoint, with its DEFAULT weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torchvision
from torch import nn

from ferkd_data.errors import TeacherError
from ferkd_data.teachers.checkpoint import load_checkpoint
from ferkd_data.teachers.digest import module_digest
from ferkd_data.teachers.module_teacher import ModuleTeacher
from ferkd_data.teachers.spec import TeacherSpec, preprocessing_of
from ferkd_data.teachers.teacher import Precision


def load(spec: TeacherSpec, *, device: str, precision: Precision) -> ModuleTeacher:
    """Load a torchvision classifier. Raises TeacherError."""
    try:
        weights: Any = torchvision.models.get_model_weights(spec.name).DEFAULT
    except (ValueError, AttributeError) as error:
        raise TeacherError(f"teacher {spec}: torchvision has no classifier of this name with weights") from error
    try:
        module = _make(spec, weights)
    except (URLError, OSError) as error:
        raise TeacherError(
            f"teacher {spec}: its pretrained weights cannot be fetched ({error}); "
            f"give a local file: torchvision:{spec.name}@FILE.pth"
        ) from error
    if spec.checkpoint is not None:
        load_checkpoint(module, Path(spec.checkpoint), teacher=str(spec))
        if hasattr(module, "transform_input") and None in (spec.mean, spec.std):
            # Inception v3 and GoogLeNet. torchvision turns the switch on with its own weights alone; the files do not
            # say which it was. Its effect is to undo ImageNet's statistics and to normalise to -1..1.
            raise TeacherError(
                f"teacher {spec}: {spec.name} normalises its input once more in some trainings, and a checkpoint does "
                "not say which: add ?mean=0.5&std=0.5 for torchvision's own file and what was fine-tuned from its "
                "weights, or the mean and std of a training from the start"
            )
    transforms = weights.transforms()
    preprocessing = preprocessing_of(
        spec,
        size=_first(getattr(transforms, "crop_size", None)),
        interpolation=getattr(getattr(transforms, "interpolation", None), "value", None),
        mean=getattr(transforms, "mean", None),
        std=getattr(transforms, "std", None),
        crop_pct=_crop_pct(transforms),
    )
    # The accuracy is that of torchvision's head.
    own_head = spec.classes is not None and spec.classes != len(weights.meta.get("categories", ()))
    published = None if own_head else weights.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
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


def _make(spec: TeacherSpec, weights: Any) -> nn.Module:
    """Create the model with its pretrained weights, or with the head and size that a checkpoint needs."""
    if spec.checkpoint is None:
        pretrained: nn.Module = torchvision.models.get_model(spec.name, weights=weights)
        return pretrained
    options: dict[str, Any] = {} if spec.classes is None else {"num_classes": spec.classes}
    # Position embeddings have to be made for the size; torchvision's other models take any, and refuse the argument.
    if spec.size is not None and spec.name.startswith("vit_"):
        options["image_size"] = spec.size
    with warnings.catch_warnings():
        # Some models warn that initialising their weights is slow; the checkpoint replaces these.
        warnings.simplefilter("ignore", FutureWarning)
        module: nn.Module = torchvision.models.get_model(spec.name, weights=None, **options)
    return module


def _first(sizes: Any) -> int | None:
    return None if sizes is None else int(sizes[0]) if isinstance(sizes, (list, tuple)) else int(sizes)


def _crop_pct(transforms: Any) -> float | None:
    """Compute the share of the shorter side that the central crop spans: crop size / resize size."""
    resized, cropped = (_first(getattr(transforms, name, None)) for name in ("resize_size", "crop_size"))
    return cropped / resized if resized and cropped and cropped <= resized else None
