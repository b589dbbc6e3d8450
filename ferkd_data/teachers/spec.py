"""Teacher specs: parse `KIND:NAME[@CHECKPOINT][?option=value&option=value]` once, and work out the preprocessing.

docs/teachers.md lists the kinds and the options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from ferkd_data.errors import TeacherError, UsageError
from ferkd_data.replay import INTERPOLATIONS, Interpolation
from ferkd_data.storage import expanded, is_utf8, shown

TeacherKind: TypeAlias = Literal["timm", "torchvision", "hf", "openclip", "onnx", "torchscript", "python"]
Activation: TypeAlias = Literal["logits", "probabilities", "sigmoid"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
Triple: TypeAlias = tuple[float, float, float]
EXAMPLE = "timm:resnet50@weights.safetensors?size=224&weight=2"
LARGEST_STATISTIC = 2.0
"""Largest mean and std of pixels scaled to 0..1, with room for uncommon scalings; those of 0..255 are far above."""
CENTRE_SHARE = 0.875
"""Share of the shorter side in the usual central crop: resize to 256, crop 224."""


@dataclass(frozen=True, kw_only=True)
class KindTraits:
    """Loader of a kind of teacher, and what its specs may hold."""

    load: str
    """`MODULE.FUNCTION` in this package; the function fulfils `teacher.LoadTeacher`."""
    takes_checkpoint: bool = False
    """Specs may end in @CHECKPOINT; the other kinds name the file with the weights in NAME."""
    takes_output: bool = False
    """Specs may have the option output."""
    takes_names: bool = False
    """Specs may have the options names and templates, of which the kind makes its classes."""
    takes_precision: bool = True
    """The teacher can run in bfloat16 or float16; on a GPU, that is the default."""


TEACHER_KINDS: dict[TeacherKind, KindTraits] = {
    "timm": KindTraits(load="timm_models.load", takes_checkpoint=True),
    "torchvision": KindTraits(load="torchvision_models.load", takes_checkpoint=True),
    "hf": KindTraits(load="hf_models.load", takes_checkpoint=True),
    "openclip": KindTraits(load="openclip_models.load", takes_checkpoint=True, takes_names=True),
    "onnx": KindTraits(load="onnx_models.load", takes_output=True, takes_precision=False),
    "torchscript": KindTraits(load="own_models.load_torchscript", takes_output=True),
    "python": KindTraits(load="own_models.load_python", takes_checkpoint=True, takes_output=True),
}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The input that a teacher expects: square crops, each RGB channel (pixel / 255 - mean) / std.

    Raises UsageError for values outside their ranges.
    """

    size: int
    """Side of the square in pixels, 1..8192."""
    interpolation: Interpolation = "bilinear"
    mean: Triple
    """Per channel, in units of pixel values scaled to 0..1."""
    std: Triple
    """Per channel, in units of pixel values scaled to 0..1; positive."""
    crop_pct: float = CENTRE_SHARE
    """Share of the shorter side that the central crop of `evaluate` spans; a build does not use it."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 8192:
            raise UsageError(f"size must be 1..8192, got {self.size}")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if min(self.std) <= 0:
            raise UsageError(f"std must be positive, got {self.std}")
        if max(map(abs, (*self.mean, *self.std))) > LARGEST_STATISTIC:
            raise UsageError(
                f"mean and std are in units of pixels scaled to 0..1, got mean={_text(self.mean)} and "
                f"std={_text(self.std)}; divide those of pixels in 0..255 by 255, as in mean=127/255"
            )
        if not 0 < self.crop_pct <= 1:
            raise UsageError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """A teacher of an ensemble: which model, and how it is used.

    `build(teachers=[...])` takes specs as texts or as objects of this class. `parse` reads a text, `str` writes it.

    Raises UsageError for values outside their ranges, and for options that the kind does not take.

    >>> spec = fd.TeacherSpec.parse("timm:resnet50@w.pth?classes=37&weight=2")
    >>> spec.kind, spec.name, spec.checkpoint, spec.classes
    ('timm', 'resnet50', 'w.pth', 37)
    >>> str(spec)
    'timm:resnet50@w.pth?classes=37&weight=2.0'
    """

    kind: TeacherKind
    name: str
    """The model's name, the file (onnx, torchscript), or `package.module:factory` (python)."""
    checkpoint: str | None = None
    """File, folder (hf) or tag (openclip) of the weights; None: the model's pretrained weights."""
    size: int | None = None
    """Side of the square input in pixels; None here and below: as the model's library says."""
    interpolation: Interpolation | None = None
    mean: Triple | None = None
    """Per channel, in units of pixel values scaled to 0..1."""
    std: Triple | None = None
    """Per channel, in units of pixel values scaled to 0..1."""
    crop_pct: float | None = None
    """Share of the shorter side that the central crop of `evaluate` spans."""
    classes: int | None = None
    """Number of classes: size of the head that timm and torchvision make; checked against the output of any kind."""
    output: str | None = None
    """Name or number of the output that holds the logits, where the model has several."""
    activation: Activation | None = None
    """Kind of numbers in the output; None: logits, refused where they look like probabilities."""
    names: str | None = None
    """openclip: `imagenet`, or a text file with one class name per line."""
    templates: str | None = None
    """openclip: `imagenet`, `simple`, or a text file with one prompt per line, `{}` standing for the class name."""
    weight: float = 1.0
    """Weight relative to the other teachers of the ensemble."""
    temperature: float = 1.0
    """Divisor of the logits."""

    def __post_init__(self) -> None:
        if not (0 < self.weight < math.inf and 0 < self.temperature < math.inf):
            raise UsageError(f"teacher {self.name}: weight and temperature must be positive and finite")
        self._check_texts()
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UsageError(f"teacher {self.name}: crop_pct must be above 0 and at most 1, got {self.crop_pct:g}")
        if self.classes is not None and self.classes < 1:
            raise UsageError(f"teacher {self.name}: classes must be at least 1, got {self.classes}")
        if self.checkpoint is not None and not TEACHER_KINDS[self.kind].takes_checkpoint:
            raise UsageError(
                f"teacher {self.kind}:{self.name}: the file itself holds the weights; drop @{self.checkpoint}"
            )
        if self.output is not None and not TEACHER_KINDS[self.kind].takes_output:
            takers = ", ".join(kind for kind, traits in TEACHER_KINDS.items() if traits.takes_output)
            raise UsageError(f"teacher {self.kind}:{self.name}: only {takers} take the option output")
        if (self.names or self.templates) and not TEACHER_KINDS[self.kind].takes_names:
            takers = ", ".join(kind for kind, traits in TEACHER_KINDS.items() if traits.takes_names)
            raise UsageError(f"teacher {self.kind}:{self.name}: only {takers} takes the options names and templates")

    def _check_texts(self) -> None:
        """Raise UsageError for names that a spec cannot be written with, or that libraries cannot open."""
        for text in filter(None, (self.name, self.checkpoint, self.names, self.templates, self.output)):
            if not is_utf8(text):
                raise UsageError(f"teacher {self.kind}:{shown(text)}: the name is not UTF-8; rename the file")
        for text in filter(None, (self.name, self.checkpoint)):
            if "?" in text:
                raise UsageError(
                    f"teacher {self.kind}:{text}: a ? begins the options, so no name can hold one; rename the file or "
                    "folder, or give a link to it"
                )
        for value in (self.names, self.templates, self.output):
            if value and "&" in value:
                raise UsageError(
                    f"teacher {self.kind}:{self.name}: {value!r} holds an &, which begins the next option; rename it, "
                    "or give a link to it"
                )

    def __str__(self) -> str:
        """Write the spec as a text: `TeacherSpec.parse(str(spec)) == spec`."""
        options = {name: getattr(self, name) for name in OPTIONS}
        # Without defaults, so that a spec and the same spec with weight=1 have one text: it is stored and compared.
        given = {
            k: v for k, v in options.items() if v is not None and (k, v) not in (("weight", 1.0), ("temperature", 1.0))
        }
        texts = [f"{k}={_text(v)}" for k, v in given.items()]
        checkpoint = f"@{self.checkpoint}" if self.checkpoint else ""
        return f"{self.kind}:{self.name}{checkpoint}" + (f"?{'&'.join(texts)}" if texts else "")

    @classmethod
    def parse(cls, text: str) -> TeacherSpec:
        """Parse `KIND:NAME[@CHECKPOINT][?option=value&…]`. Raises UsageError that names the piece at fault."""
        # Such as a module: a build names its teachers in its manifest and makes them in each worker.
        if not isinstance(text, str):
            raise UsageError(
                f"a teacher is given as text, such as 'timm:resnet50', got {type(text).__name__}; a model of your own "
                "is 'python:MODULE:FUNCTION', whose FUNCTION returns it"
            )
        kind, colon, rest = text.partition(":")
        traits = next((traits for name, traits in TEACHER_KINDS.items() if name == kind), None)
        if traits is None or not colon:
            raise UsageError(
                f"teacher {text!r}: must start with one of {', '.join(k + ':' for k in TEACHER_KINDS)} as in {EXAMPLE}"
            )
        # Options first: their values may hold an @ or another colon.
        target, _, query = rest.partition("?")
        # Where the name is a file, an @ in it is part of the name.
        name, _, checkpoint = target.partition("@") if traits.takes_checkpoint else (target, "", "")
        if not name:
            raise UsageError(f"teacher {text!r}: names no model, as in {EXAMPLE}")
        spec: dict[str, Any] = {"kind": kind, "name": name, "checkpoint": checkpoint or None}
        for option in query.split("&") if query else []:
            key, equals, value = option.partition("=")
            if key not in OPTIONS or not equals:
                # wget writes model.onnx?download=true; a folder may be called a?b.
                is_file = "/" in option or expanded(rest).exists()
                hint = "; a name with a ? in it cannot be given: rename the file or folder, or link to it"
                raise UsageError(
                    f"teacher {text!r}: unknown option {option!r}; options are {', '.join(OPTIONS)}"
                    f"{hint if is_file else ''}"
                )
            if key in spec:
                raise UsageError(f"teacher {text!r}: the option {key} is given twice")
            spec[key] = _parse_option(text, key, value)
        return cls(**spec)


def parse_specs(teachers: str | TeacherSpec | Sequence[str | TeacherSpec]) -> tuple[TeacherSpec, ...]:
    """Parse the teachers of an ensemble. Raises UsageError as `TeacherSpec.parse` does."""
    # A single teacher is an ensemble of one; its letters would be taken for teachers.
    several = [teachers] if isinstance(teachers, (str, TeacherSpec)) else teachers
    return tuple(spec if isinstance(spec, TeacherSpec) else TeacherSpec.parse(spec) for spec in several)


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
    # Positions 0, 1, 2 of three values; all of them position 0 of one.
    return values[0], values[len(values) // 2], values[-1]


def _triple(text: str) -> Triple:
    return triple([_number(piece) for piece in text.split(",")])


def _number(text: str) -> float:
    """Parse a decimal number, or a fraction such as 127/255."""
    numerator, slash, denominator = text.partition("/")
    number = float(numerator) / float(denominator) if slash else float(numerator)
    # float() takes "nan" and "inf".
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
"""Parser of each option, in the order in which `str` writes them."""


def preprocessing_of(
    spec: TeacherSpec,
    *,
    size: int | None = None,
    interpolation: str | None = None,
    mean: object = None,
    std: object = None,
    crop_pct: float | None = None,
) -> Preprocessing:
    """Work out a teacher's preprocessing from the options of its spec, else from what its library says of the model.

    Raises TeacherError for a value that neither gives, and for an interpolation that crops cannot be cut with.
    """
    values: dict[str, Any] = {}
    for name, value, example in (
        ("size", size, "224"),
        ("mean", mean, "0.485,0.456,0.406"),
        ("std", std, "0.229,0.224,0.225"),
    ):
        # The user's options first: a library's statement may be wrong for these weights.
        chosen = getattr(spec, name) if getattr(spec, name) is not None else value
        if chosen is None:
            raise TeacherError(f"teacher {spec}: its {name} is not known; add the option, such as ?{name}={example}")
        try:
            values[name] = _side(chosen) if name == "size" else triple(_numbers(chosen))
        except (TypeError, ValueError) as error:
            raise TeacherError(f"teacher {spec}: its {name} cannot be {chosen!r}: {error}") from error
    chosen_filter = spec.interpolation or interpolation or "bilinear"
    if chosen_filter not in INTERPOLATIONS:
        raise TeacherError(
            f"teacher {spec}: its images are resized with {chosen_filter}, and crops are cut with "
            f"{' or '.join(INTERPOLATIONS)} only; choose one, such as ?interpolation=bicubic"
        )
    # 0 is refused everywhere, so `or` passes over missing values alone.
    values["crop_pct"] = spec.crop_pct or crop_pct or CENTRE_SHARE
    try:
        return Preprocessing(interpolation=chosen_filter, **values)
    except UsageError as error:
        raise UsageError(f"teacher {spec}: {error}") from error


def _side(value: Any) -> int:
    """Return the side of a square given as 224 or as (224, 224). Raises ValueError for another shape."""
    sides = {int(side) for side in (value if isinstance(value, (list, tuple)) else [value])}
    if len(sides) != 1:
        raise ValueError("only square images are supported")
    return sides.pop()


def _numbers(value: Any) -> list[float]:
    return [float(x) for x in (value if isinstance(value, Iterable) else [value])]
