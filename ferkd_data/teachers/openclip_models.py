"""Zero-shot teachers from open_clip, `openclip:ARCH@CHECKPOINT?names=FILE`: the names of the classes are embedded."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ferkd_data import extras
from ferkd_data.errors import SourceError, TeacherError
from ferkd_data.images import read_class_list
from ferkd_data.storage import expanded, read_text
from ferkd_data.teachers.digest import module_digest
from ferkd_data.teachers.module_teacher import ModuleTeacher
from ferkd_data.teachers.spec import TeacherSpec, preprocessing_of
from ferkd_data.teachers.teacher import Precision, reason

IMAGENET = "imagenet"
SIMPLE = "simple"
NO_NAME = re.compile(r"n?\d+")
"""WordNet IDs, and plain numbers."""
SELF_CONTAINED = ("hf-hub:", "local-dir:")
"""Prefixes of architectures whose name includes the location of the weights."""


class ZeroShot(nn.Module):
    """A zero-shot classifier: logits are scale * cosine(image embedding, class embedding) + bias, as trained."""

    weight_DC: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, model: Any, weight_DC: Tensor) -> None:
        super().__init__()
        # The text tower is no longer needed. Only models that compute image features in another way keep it.
        self.tower = model.visual if type(model).__name__ in ("CLIP", "CustomTextCLIP") else model
        self.whole = self.tower is model
        self.register_buffer("weight_DC", weight_DC.detach().clone())
        self.register_buffer("scale", model.logit_scale.detach().exp().clone())
        bias = getattr(model, "logit_bias", None)
        self.register_buffer("bias", torch.zeros(()) if bias is None else bias.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        features = self.tower.encode_image(images) if self.whole else self.tower(images)
        return self.scale * nn.functional.normalize(features, dim=-1) @ self.weight_DC + self.bias


def load(spec: TeacherSpec, *, device: str, precision: Precision) -> ModuleTeacher:
    """Load a model and embed the names of the classes. Raises TeacherError, MissingExtraError."""
    open_clip = extras.require("open_clip", extra="openclip", what_for=f"teacher {spec}")
    names, templates = _names(spec, open_clip), _templates(spec, open_clip)
    try:
        model = open_clip.create_model(
            spec.name,
            pretrained=str(expanded(spec.checkpoint)) if spec.checkpoint else None,
            # Otherwise open_clip goes on with random weights, and only logs it.
            require_pretrained=True,
            force_image_size=spec.size,
        ).eval()
        tokenizer = open_clip.get_tokenizer(spec.name)
        with torch.inference_mode():
            weight = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    except Exception as error:
        # Architectures, hub and tokenisers each raise errors of their own.
        raise TeacherError(
            f"teacher {spec}: open_clip cannot make it: {reason(error)}{_tags(open_clip, spec)}"
        ) from error
    config = open_clip.get_model_preprocess_cfg(model)
    module = ZeroShot(model, weight)
    return ModuleTeacher(
        module,
        spec,
        preprocessing_of(
            spec,
            size=config["size"],
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            crop_pct=1.0,
        ),
        digest=module_digest(module, spec),
        device=device,
        precision=precision,
        class_names=tuple(names),
    )


def _names(spec: TeacherSpec, open_clip: Any) -> list[str]:
    """Read the class names in order, from a file in any of the forms of `--classes`. Raises TeacherError."""
    if spec.names is None:
        raise TeacherError(
            f"teacher {spec}: needs the names of the classes: ?names=FILE with one per line in the order of the "
            "classes (a file for --classes does), or ?names=imagenet"
        )
    if spec.names == IMAGENET:
        return list(open_clip.IMAGENET_CLASSNAMES)
    try:
        listed = read_class_list(expanded(spec.names))
    except SourceError as error:
        raise TeacherError(f"teacher {spec}: {error}") from error
    if all(NO_NAME.fullmatch(name) for name in listed.names):
        raise TeacherError(
            f"teacher {spec}: {spec.names} has numbers for its classes ({listed.names[0]!r}), which mean nothing in a "
            "prompt; write each class's name behind a tab"
        )
    # Prompts are sentences: folder names such as golden_retriever lose their underscores.
    return [
        name.replace("_", " ") if name == folder else name
        for folder, name in zip(listed.folders, listed.names, strict=True)
    ]


def _templates(spec: TeacherSpec, open_clip: Any) -> list[Any]:
    """Make the prompt functions; each class's embedding is the mean over its prompts."""
    chosen = spec.templates or IMAGENET
    if chosen in (IMAGENET, SIMPLE):
        return list(open_clip.OPENAI_IMAGENET_TEMPLATES if chosen == IMAGENET else open_clip.SIMPLE_IMAGENET_TEMPLATES)
    lines = _lines(spec, chosen)
    for line in lines:
        if line.count("{}") != 1:
            raise TeacherError(f"teacher {spec}: {chosen}: {line!r} must have {{}} once, for the name of the class")
    return [partial(_filled, line) for line in lines]


def _filled(template: str, name: str) -> str:
    return template.replace("{}", name)


def _lines(spec: TeacherSpec, file: str) -> list[str]:
    try:
        lines = read_text(expanded(file)).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"teacher {spec}: {file} cannot be read: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines or not all(line.strip() for line in lines):
        raise TeacherError(f"teacher {spec}: {file}: is empty, or has empty lines between others")
    return [line.strip() for line in lines]


def _tags(open_clip: Any, spec: TeacherSpec) -> str:
    """Suggest the pretrained weights that open_clip offers, for a spec that names none."""
    if spec.checkpoint or spec.name.startswith(SELF_CONTAINED):
        return ""
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    return f"; name its weights: openclip:{spec.name}@{'|'.join(tags) if tags else 'FILE'}"
