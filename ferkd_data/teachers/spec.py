"""A teacher as the user writes it, parsed once.

    KIND:NAME[@CHECKPOINT][?option=value&option=value]

KIND is timm, torchvision, onnx, torchscript or python. Options: size, interpolation, mean, std, weight, temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from ferkd_data.errors import UsageError
from ferkd_data.replay import INTERPOLATIONS, Interpolation

Kind: TypeAlias = Literal["timm", "torchvision", "onnx", "torchscript", "python"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Triple: TypeAlias = tuple[float, float, float]
OPTIONS = ("size", "interpolation", "mean", "std", "weight", "temperature")
WITH_CHECKPOINT: tuple[Kind, ...] = ("timm", "torchvision", "python")
EXAMPLE = "timm:resnet50@weights.safetensors?size=224&weight=2"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a teacher wants to see: square crops, (pixel / 255 - mean) / std per RGB channel."""

    size: int
    interpolation: Interpolation = "bilinear"
    mean: Triple
    std: Triple

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 8192:
            raise UsageError(f"size must be 1..8192, got {self.size}")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if min(self.std) <= 0:
            raise UsageError(f"std must be positive, got {self.std}")


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    kind: Kind
    name: str
    """The model's name, the file (onnx, torchscript), or `package.module:factory` (python)."""
    checkpoint: str | None = None
    size: int | None = None
    interpolation: Interpolation | None = None
    mean: Triple | None = None
    std: Triple | None = None
    weight: float = 1.0
    """Relative to the other teachers of the ensemble."""
    temperature: float = 1.0
    """The logits are divided by it."""

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.temperature <= 0:
            raise UsageError(f"teacher {self.name}: weight and temperature must be positive")
        if self.checkpoint is not None and self.kind not in WITH_CHECKPOINT:
            raise UsageError(
                f"teacher {self.kind}:{self.name}: the file itself holds the weights; drop @{self.checkpoint}"
            )

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
        spec = {"kind": kind, "name": name, "checkpoint": checkpoint or None}
        for option in query.split("&") if query else []:
            key, equals, value = option.partition("=")
            if key not in OPTIONS or not equals:
                raise UsageError(f"teacher {text!r}: unknown option {option!r}; options are {', '.join(OPTIONS)}")
            spec[key] = _parse_option(text, key, value)  # type: ignore[assignment]
        return cls(**spec)  # type: ignore[arg-type]


def _parse_option(text: str, key: str, value: str) -> object:
    try:
        if key == "interpolation":
            if value not in INTERPOLATIONS:
                raise ValueError(f"must be one of {', '.join(INTERPOLATIONS)}")
            return value
        if key == "size":
            return int(value)
        if key in ("weight", "temperature"):
            return _number(value)
        values = [_number(piece) for piece in value.split(",")]
        if len(values) == 1:
            values *= 3
        if len(values) != 3:
            raise ValueError("takes one value, or three separated by commas")
        return tuple(values)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"teacher {text!r}: {key}={value}: {error}") from error


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return repr(value[0]) if len(set(value)) == 1 else ",".join(map(repr, value))
    return str(value)


def _number(text: str) -> float:
    """A decimal number, or a fraction such as 127/255."""
    numerator, slash, denominator = text.partition("/")
    return float(numerator) / float(denominator) if slash else float(numerator)
