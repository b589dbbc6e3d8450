"""A teacher as the user writes it, parsed once.

    KIND:NAME[@CHECKPOINT][?option=value&option=value]

docs/teachers.md lists the kinds and the options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from ferkd_data.errors import UsageError
from ferkd_data.replay import INTERPOLATIONS, Interpolation

Kind: TypeAlias = Literal["timm", "torchvision", "hf", "openclip", "onnx", "torchscript", "python"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Activation: TypeAlias = Literal["logits", "probabilities", "sigmoid"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
Triple: TypeAlias = tuple[float, float, float]
WITH_CHECKPOINT: tuple[Kind, ...] = ("timm", "torchvision", "hf", "openclip", "python")
WITH_OUTPUT: tuple[Kind, ...] = ("onnx", "torchscript", "python")
EXAMPLE = "timm:resnet50@weights.safetensors?size=224&weight=2"
CENTRE_SHARE = 0.875
"""Share of the shorter side in the usual central crop (resize to 256, crop 224)."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The input a teacher expects: square crops, (pixel / 255 - mean) / std per RGB channel."""

    size: int
    interpolation: Interpolation = "bilinear"
    mean: Triple
    std: Triple
    crop_pct: float = CENTRE_SHARE
    """Share of the shorter side that the central crop of `evaluate` spans; a build does not use it."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 8192:
            raise UsageError(f"size must be 1..8192, got {self.size}")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if min(self.std) <= 0:
            raise UsageError(f"std must be positive, got {self.std}")
        if not 0 < self.crop_pct <= 1:
            raise UsageError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """A parsed teacher spec. Raises UsageError for options that do not go together.

    >>> TeacherSpec.parse("timm:resnet50@w.pth?classes=37&weight=2").classes
    37
    """

    kind: Kind
    name: str
    """The model's name, the file (onnx, torchscript), or `package.module:factory` (python)."""
    checkpoint: str | None = None
    size: int | None = None
    """Side of the square input in pixels."""
    interpolation: Interpolation | None = None
    mean: Triple | None = None
    std: Triple | None = None
    crop_pct: float | None = None
    """Share of the shorter side that the central crop of `evaluate` spans."""
    classes: int | None = None
    """Number of classes: the head that timm and torchvision make; for every kind, what the output must have."""
    output: str | None = None
    """Name or number of the output that holds the logits, where the model has several."""
    activation: Activation | None = None
    """What the output is; None: logits, checked for looking like probabilities."""
    names: str | None = None
    """openclip: `imagenet`, or a text file with one class name per line."""
    templates: str | None = None
    """openclip: `imagenet`, `simple`, or a text file with one prompt per line, `{}` standing for the class name."""
    weight: float = 1.0
    """Relative to the other teachers of the ensemble."""
    temperature: float = 1.0
    """The logits are divided by it."""

    def __post_init__(self) -> None:
        if not (0 < self.weight < math.inf and 0 < self.temperature < math.inf):
            raise UsageError(f"teacher {self.name}: weight and temperature must be positive and finite")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UsageError(f"teacher {self.name}: crop_pct must be above 0 and at most 1, got {self.crop_pct:g}")
        if self.classes is not None and self.classes < 1:
            raise UsageError(f"teacher {self.name}: classes must be at least 1, got {self.classes}")
        if self.checkpoint is not None and self.kind not in WITH_CHECKPOINT:
            raise UsageError(
                f"teacher {self.kind}:{self.name}: the file itself holds the weights; drop @{self.checkpoint}"
            )
        if self.output is not None and self.kind not in WITH_OUTPUT:
            raise UsageError(f"teacher {self.kind}:{self.name}: only {', '.join(WITH_OUTPUT)} take the option output")

        if self.kind != "openclip" and (self.names or self.templates):
            raise UsageError(f"teacher {self.kind}:{self.name}: only openclip takes the options names and templates")

    def __str__(self) -> str:
        """The spec again; `TeacherSpec.parse(str(spec)) == spec`."""
        options = {name: getattr(self, name) for name in OPTIONS}
        given = {
            k: v for k, v in options.items() if v is not None and (k, v) not in (("weight", 1.0), ("temperature", 1.0))
        }
        texts = [f"{k}={_text(v)}" for k, v in given.items()]
        checkpoint = f"@{self.checkpoint}" if self.checkpoint else ""
        return f"{self.kind}:{self.name}{checkpoint}" + (f"?{'&'.join(texts)}" if texts else "")

    @classmethod
    def parse(cls, text: str) -> TeacherSpec:
        """Raises UsageError that names the part at fault."""
        kind, colon, rest = text.partition(":")
        if kind not in KINDS or not colon:
            raise UsageError(
                f"teacher {text!r}: must start with one of {', '.join(k + ':' for k in KINDS)} as in {EXAMPLE}"
            )
        target, _, query = rest.partition("?")
        name, _, checkpoint = target.partition("@") if kind in WITH_CHECKPOINT else (target, "", "")
        if not name:
            raise UsageError(f"teacher {text!r}: names no model, as in {EXAMPLE}")
        spec: dict[str, Any] = {"kind": kind, "name": name, "checkpoint": checkpoint or None}
        for option in query.split("&") if query else []:
            key, equals, value = option.partition("=")
            if key not in OPTIONS or not equals:
                raise UsageError(f"teacher {text!r}: unknown option {option!r}; options are {', '.join(OPTIONS)}")
            if key in spec:
                raise UsageError(f"teacher {text!r}: the option {key} is given twice")
            spec[key] = _parse_option(text, key, value)
        return cls(**spec)


def _parse_option(text: str, key: str, value: str) -> object:
    try:
        return OPTIONS[key](value)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"teacher {text!r}: {key}={value}: {error}") from error


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return parse


def _word(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return text


def triple(values: Sequence[float]) -> Triple:
    """Return three values, one for each channel, from three or from one. Raises ValueError for another number."""
    if len(values) not in (1, 3):
        raise ValueError("takes one value, or three separated by commas")
    return values[0], values[len(values) // 2], values[-1]


def _triple(text: str) -> Triple:
    return triple([_number(piece) for piece in text.split(",")])


def _number(text: str) -> float:
    """A decimal number, or a fraction such as 127/255."""
    numerator, slash, denominator = text.partition("/")
    number = float(numerator) / float(denominator) if slash else float(numerator)
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return repr(value[0]) if len(set(value)) == 1 else ",".join(map(repr, value))
    return str(value)


OPTIONS: dict[str, Callable[[str], object]] = {
    "size": int,
    "interpolation": _one_of(INTERPOLATIONS),
    "mean": _triple,
    "std": _triple,
    "crop_pct": _number,
    "classes": int,
    "output": _word,
    "activation": _one_of(ACTIVATIONS),
    "names": _word,
    "templates": _word,
    "weight": _number,
    "temperature": _number,
}
"""Name of each option -> its parser, in the order in which a spec is written."""
