"""Teachers from transformers: `hf:ORG/NAME[@folder]`. Their preprocessing is measured by running their processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ferkd_data import extras
from ferkd_data.errors import TeacherError
from ferkd_data.storage import expanded
from ferkd_data.teachers.digest import module_digest
from ferkd_data.teachers.module_teacher import ModuleTeacher
from ferkd_data.teachers.spec import TeacherSpec, preprocessing_of
from ferkd_data.teachers.teacher import Precision, reason

RESAMPLINGS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Names of Pillow's numbers, which processors use."""
PROBE_SIDE = 256
"""Side in pixels of the images that a processor is tried on: one column for each grey level."""
CLOSE = 1e-4
"""Largest difference at which a measured value counts as the one in the processor's settings."""


class HfClassifier(nn.Module):
    """Wrap a transformers model as a function from RGB images (B, 3, S, S) to logits (B, C)."""

    def __init__(self, model: nn.Module, *, bgr: bool) -> None:
        super().__init__()
        self.model = model
        self.bgr = bgr

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images.flip(1) if self.bgr else images).logits
        return logits


def load(spec: TeacherSpec, *, device: str, precision: Precision) -> ModuleTeacher:
    """Load a model and its image processor. Raises TeacherError, MissingExtraError."""
    transformers = extras.require("transformers", extra="hf", what_for=f"teacher {spec}")
    source = str(expanded(spec.checkpoint)) if spec.checkpoint else spec.name
    if spec.checkpoint and not Path(source).is_dir():
        raise TeacherError(f"teacher {spec}: no folder {source}; it must contain the files that save_pretrained writes")
    try:
        model, found = transformers.AutoModelForImageClassification.from_pretrained(source, output_loading_info=True)
        processor = transformers.AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise TeacherError(
            f"teacher {spec}: transformers cannot load it ({reason(error)}); for a local folder, write "
            f"{spec.kind}:{spec.name}@FOLDER"
        ) from error
    # transformers fills them at random and only logs it.
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise TeacherError(
            f"teacher {spec}: its checkpoint lacks {len(missing)} weights ({', '.join(missing[:3])}), which would be "
            "random; it has no classifier, or belongs to another model"
        )
    # transformers 5 keeps the dtype of the file; what is below float32 is for `precision` to say.
    model = model.float()
    known, bgr = measure_processor(processor, spec)
    names = tuple(model.config.id2label[number] for number in sorted(model.config.id2label))
    module = HfClassifier(model, bgr=bgr)
    return ModuleTeacher(
        module,
        spec,
        preprocessing_of(spec, **known),
        digest=module_digest(module, spec),
        device=device,
        precision=precision,
        # LABEL_0, LABEL_1, … are transformers' own names for classes without names.
        class_names=None if names[0] == "LABEL_0" else names,
    )


def measure_processor(processor: Any, spec: TeacherSpec) -> tuple[dict[str, Any], bool]:
    """Measure a processor's preprocessing, and whether it gives BGR, on known images.

    Its settings are not trusted: their names and meanings differ from class to class (rescaling by 1/127.5 with an
    offset, normalising twice, warping or cropping). Raises TeacherError for processing that crops cannot be given.
    """
    black, grey, white = (
        _seen(processor, np.full((PROBE_SIDE, PROBE_SIDE, 3), level, np.uint8), spec) for level in (0, 51, 255)
    )
    size = black.shape[1]
    # Scaling and normalising are linear, output = low + pixel / 255 * (high - low), so grey 51 = 255 / 5 checks it.
    low, middle, high = (image.mean(axis=(1, 2)) for image in (black, grey, white))
    if (
        black.shape != (3, size, size)
        or np.abs(low + (high - low) / 5 - middle).max() > 0.02 * np.abs(high - low).max()
        # A picture of one colour stays one: a border would be part of the means above.
        or any(np.ptp(image, axis=(1, 2)).max() > CLOSE * np.abs(high - low).max() for image in (black, grey, white))
    ):
        raise TeacherError(
            f"teacher {spec}: its image processor turns a square image into {black.shape}, or does more than scaling "
            "and normalising; write a python: teacher that does the same"
        )
    red = np.zeros((PROBE_SIDE, PROBE_SIDE, 3), np.uint8)
    red[..., 0] = 255
    # The channels in which a red image differs from a black one.
    changed = np.abs(_seen(processor, red, spec).mean(axis=(1, 2)) - low) > CLOSE * np.abs(high - low)
    if changed.tolist() not in ([True, False, False], [False, False, True]):
        raise TeacherError(
            f"teacher {spec}: its image processor mixes the colours; write a python: teacher that does the same"
        )
    bgr = bool(changed[2])
    # Without resizing, the side is that of whatever picture comes.
    resizes = _seen(processor, np.zeros((2 * PROBE_SIDE, 2 * PROBE_SIDE, 3), np.uint8), spec).shape[1] == size
    # (0 - mean) / std = low and (1 - mean) / std = high.
    std = 1 / (high - low)
    mean = -low * std
    order = slice(None, None, -1) if bgr else slice(None)
    return {
        "size": size if resizes else None,
        "mean": _as_written(mean[order], getattr(processor, "image_mean", None)),
        "std": _as_written(std[order], getattr(processor, "image_std", None)),
        "interpolation": _interpolation(processor),
        "crop_pct": _share_seen(processor, mean[0], std[0], spec),
    }, bgr


def _seen(processor: Any, image_HWC: npt.NDArray[np.uint8], spec: TeacherSpec) -> npt.NDArray[np.float64]:
    """Run the processor on one image; return the model's input (3, S, S)."""
    from PIL import Image

    try:
        values = processor(images=Image.fromarray(image_HWC), return_tensors="pt")["pixel_values"]
        return np.asarray(values[0], np.float64)
    except Exception as error:
        # A processor's own code may raise anything.
        raise TeacherError(f"teacher {spec}: its image processor fails on an RGB image: {reason(error)}") from error


def _as_written(values: npt.NDArray[np.float64], written: Any) -> tuple[float, ...]:
    """Return the numbers in the processor's settings where they agree with the measured ones, else those, rounded."""
    if written is not None and np.shape(written) == (3,) and np.abs(values - np.asarray(written)).max() < CLOSE:
        return tuple(float(value) for value in written)
    return tuple(round(float(value), 6) for value in values)


def _interpolation(processor: Any) -> str | None:
    config = getattr(processor, "data_config", None)
    if config is not None:
        return None if config["interpolation"] == "random" else str(config["interpolation"])
    number = getattr(processor, "resample", None)
    return None if number is None else RESAMPLINGS.get(int(number), str(number))


def _share_seen(processor: Any, mean: float, std: float, spec: TeacherSpec) -> float:
    """Measure the share of a square image's side that reaches the model, by the grey levels at the ends of a ramp."""
    ramp = np.broadcast_to(np.arange(PROBE_SIDE, dtype=np.uint8)[None, :, None], (PROBE_SIDE, PROBE_SIDE, 3)).copy()
    levels = (_seen(processor, ramp, spec)[0] * std + mean) * 255
    row = levels[len(levels) // 2]
    # The ends are centres of pixels, half a pixel inside the visible part: n pixels show n - 1 of their n steps.
    share = float(row[-1] - row[0]) / PROBE_SIDE * len(row) / (len(row) - 1)
    return min(1.0, round(share, 2))
