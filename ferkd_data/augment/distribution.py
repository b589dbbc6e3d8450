"""Draw the operations of crops: augmentations as pure functions of (seed, key, crop number).

An augmentation is written `KIND` or `KIND:OPTION,OPTION`, as in `randaugment:n=2,m=9`, `colorjitter:0.4,0.4,0.4,0.1` or
`erase:p=0.25`. Several are applied in the given order; `erase` always comes last.

Legend: N crops, A recorded operations of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.augment.operations import BOX_UNIT_BITS, BOX_WORDS, CODES, FACTOR, UNIT, Operations
from ferkd_data.errors import UsageError

WORDS = 32
"""64-bit random words for each crop and augmentation: a multiple of 4, the words of a Philox counter."""
BINS = 31
"""Number of magnitudes of RandAugment and TrivialAugment, as in torchvision."""
REFERENCE_SIDE = 224
"""Side of the crop to which pixels in options refer (blur's sigma, TrivialAugment's translation)."""
ERASE_ATTEMPTS = 10
"""Shapes that are tried for an erased box, as in torchvision."""
FACTORS = ("brightness", "saturation", "contrast", "sharpness")
"""Operations whose value is a factor, 1 plus or minus the magnitude; in the order of torchvision's search spaces."""

Uniforms = npt.NDArray[np.float64]
Drawn = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int16]]
Range = tuple[float, float]


class _Magnitudes(NamedTuple):
    """An operation of a search space with its magnitudes."""

    operation: str
    values: npt.NDArray[np.int16]
    """Fixed-point value of each bin: (BINS,)."""
    signed: bool
    """The sign is drawn as well."""


def _space(*, shear: float, translate: float, degrees: float, factor: float, bits: float) -> list[_Magnitudes | None]:
    """Make torchvision's search space of RandAugment or TrivialAugmentWide; None is the identity."""
    step = np.arange(BINS) / (BINS - 1)

    def values(largest: float, unit: float) -> npt.NDArray[np.int16]:
        return np.rint(largest * step * unit).astype(np.int16)

    factors = [_Magnitudes(name, values(factor, FACTOR), True) for name in FACTORS]
    return [
        None,
        _Magnitudes("shear_x", values(shear, UNIT), True),
        _Magnitudes("shear_y", values(shear, UNIT), True),
        _Magnitudes("translate_x", values(translate, UNIT), True),
        _Magnitudes("translate_y", values(translate, UNIT), True),
        _Magnitudes("rotate", values(degrees, 100), True),
        *factors,
        _Magnitudes("posterize", (8 - np.rint(np.arange(BINS) / ((BINS - 1) / bits))).astype(np.int16), False),
        _Magnitudes("solarize", np.rint(255 * (1 - step)).astype(np.int16), False),
        _Magnitudes("autocontrast", np.zeros(BINS, np.int16), False),
        _Magnitudes("equalize", np.zeros(BINS, np.int16), False),
    ]


# Largest magnitudes as in torchvision's RandAugment and TrivialAugmentWide. The former translates by 150 / 331 of the
# side, the latter by 32 pixels, which are stored as a share of the usual crop so that every input size sees the same.
RANDAUGMENT = _space(shear=0.3, translate=150 / 331, degrees=30, factor=0.9, bits=4)
TRIVIALAUGMENT = _space(shear=0.99, translate=32 / REFERENCE_SIDE, degrees=135, factor=0.99, bits=6)


def _from_space(
    space: Sequence[_Magnitudes | None], choice: Uniforms, magnitude: npt.NDArray[np.int64], sign: Uniforms
) -> Drawn:
    """Choose operations uniformly from `space`; return their codes and values, each (N,)."""
    number = np.floor(choice * len(space)).astype(np.int64)
    codes = np.array([0 if entry is None else CODES[entry.operation] for entry in space], np.uint8)
    table = np.stack([np.zeros(BINS, np.int16) if entry is None else entry.values for entry in space])
    signed = np.array([entry is not None and entry.signed for entry in space])
    value = table[number, magnitude].astype(np.int64)
    value = np.where(signed[number] & (sign < 0.5), -value, value)
    is_factor = np.isin(codes[number], [CODES[name] for name in FACTORS])
    return codes[number], (value + np.where(is_factor, FACTOR, 0)).astype(np.int16)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """An augmentation with its options. `parse` reads one, `str` writes it."""

    kind: str
    options: tuple[tuple[str, float | Range], ...]

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """Parse `KIND` or `KIND:OPTION,…`; an option is `NAME=VALUE`, or a value in the order of the names.

        Raises UsageError for an unknown kind or option, and for values outside their ranges.
        """
        kind, _, rest = text.strip().partition(":")
        if kind not in AUGMENTATION_KINDS:
            raise UsageError(f"augmentation {text!r}: the kind must be one of {', '.join(AUGMENTATION_KINDS)}")
        allowed = AUGMENTATION_KINDS[kind].options
        given: dict[str, float | Range] = {}
        pieces = rest.split(",") if rest else []
        for position in range(len(pieces)):
            name, value = _name_and_value(text, kind, pieces, position)
            if name not in allowed or name in given:
                raise UsageError(
                    f"augmentation {text!r}: {name!r} is not an option of {kind}, or is given twice; {_names(kind)}"
                )
            given[name] = _number_or_range(text, name, value, isinstance(allowed[name].default, tuple))
        options = {name: given.get(name, option.default) for name, option in allowed.items()}
        for name, option in allowed.items():
            low, high = option.bounds
            values = options[name]
            pair = values if isinstance(values, tuple) else (values, values)
            if not low <= pair[0] <= pair[1] <= high:
                raise UsageError(f"augmentation {text!r}: {name} must be in {low:g}..{high:g}, got {_text(values)}")
            if option.whole and pair[0] != int(pair[0]):
                raise UsageError(f"augmentation {text!r}: {name} must be a whole number, got {_text(values)}")
        return cls(kind=kind, options=tuple(options.items()))

    def __str__(self) -> str:
        options = ",".join(f"{name}={_text(value)}" for name, value in self.options)
        return f"{self.kind}:{options}" if options else self.kind

    @property
    def num_operations(self) -> int:
        """Number of operations that the augmentation records (A); 0 for `erase`, which has columns of its own."""
        return AUGMENTATION_KINDS[self.kind].slots(dict(self.options))

    def number(self, name: str) -> float:
        value = dict(self.options)[name]
        assert isinstance(value, float)
        return value

    def range(self, name: str) -> Range:
        value = dict(self.options)[name]
        assert isinstance(value, tuple)
        return value


def parse_augmentations(texts: Iterable[str]) -> tuple[Augmentation, ...]:
    """Parse augmentations, in order. Raises UsageError, also for more than one `erase`."""
    augmentations = tuple(Augmentation.parse(text) for text in texts)
    if sum(one.kind == "erase" for one in augmentations) > 1:
        raise UsageError("erase can be given once")
    return augmentations


def num_words(augmentations: Sequence[Augmentation]) -> int:
    """Count the words of a crop in `Operations.pack` (W); 0 without augmentations."""
    return 2 * sum(one.num_operations for one in augmentations) + BOX_WORDS if augmentations else 0


def draw_operations(
    key: str, augmentations: Sequence[Augmentation], *, seed: int, first: int, count: int
) -> Operations:
    """Draw the operations of crops number `first` .. `first + count - 1` of the image `key`.

    Crop n uses words 32n .. 32n+31 of a Philox stream, keyed by a hash of (seed, key, number of the augmentation). So
    further crops, or a further augmentation at the end, leave the operations drawn before unchanged.
    """
    codes, values = [], []
    erase = np.zeros((count, 4), np.uint16)
    for number, augmentation in enumerate(augmentations):
        stream = rng.philox("augment", number, seed, key)
        # In counters of 4 words, as in `crops.draw_crops`.
        stream.advance(first * (WORDS // 4))
        u = rng.uniforms(stream.random_raw(count * WORDS)).reshape(count, WORDS)
        if augmentation.kind == "erase":
            erase = _draw_erase(augmentation, u)
            continue
        for code, value in AUGMENTATION_KINDS[augmentation.kind].draw(augmentation, u):
            codes.append(code)
            values.append(value)
    if not codes:
        return Operations(codes=np.zeros((count, 0), np.uint8), values=np.zeros((count, 0), np.int16), erase=erase)
    return Operations(codes=np.stack(codes, axis=1), values=np.stack(values, axis=1), erase=erase)


def _draw_randaugment(one: Augmentation, u: Uniforms) -> list[Drawn]:
    """Draw RandAugment (Cubuk et al., 2020): `n` of torchvision's operations, each at bin `m` of 0..30."""
    magnitude = np.full(len(u), int(one.number("m")))
    return [_from_space(RANDAUGMENT, u[:, 2 * i], magnitude, u[:, 2 * i + 1]) for i in range(int(one.number("n")))]


def _draw_trivialaugment(one: Augmentation, u: Uniforms) -> list[Drawn]:
    """Draw TrivialAugmentWide (Müller and Hutter, 2021): one operation at a uniform magnitude."""
    return [_from_space(TRIVIALAUGMENT, u[:, 0], np.floor(u[:, 2] * BINS).astype(np.int64), u[:, 1])]


def _draw_colorjitter(one: Augmentation, u: Uniforms) -> list[Drawn]:
    """Draw torchvision's ColorJitter: four factors, in an order drawn for each crop."""
    names = ("brightness", "contrast", "saturation", "hue")
    values = []
    for i, name in enumerate(names):
        strength = one.number(name)
        if name == "hue":
            values.append(np.rint((2 * u[:, i] - 1) * strength * UNIT))
        else:
            # torchvision's range of a factor: 1 - strength .. 1 + strength, never negative.
            low = max(0.0, 1 - strength)
            values.append(np.rint((low + u[:, i] * (1 + strength - low)) * FACTOR))
    # The order of four independent uniforms is a uniform permutation.
    order = np.argsort(u[:, 4:8], axis=1)
    used = [one.number(name) > 0 for name in names]
    codes_N4 = np.array([CODES[name] if used[i] else 0 for i, name in enumerate(names)], np.uint8)[order]
    values_N4 = np.take_along_axis(np.stack(values, axis=1) * used, order, axis=1).astype(np.int16)
    codes_N4, values_N4 = _with_probability(one, u[:, 8], codes_N4, values_N4)
    return [(codes_N4[:, i], values_N4[:, i]) for i in range(4)]


def _with_probability(
    one: Augmentation, u: Uniforms, codes: npt.NDArray[np.uint8], values: npt.NDArray[np.int16]
) -> Drawn:
    there = (u < one.number("p")).reshape(-1, *[1] * (codes.ndim - 1))
    return np.where(there, codes, 0).astype(np.uint8), np.where(there, values, 0).astype(np.int16)


def _single(value: Callable[[Augmentation, Uniforms], Uniforms]) -> Callable[[Augmentation, Uniforms], list[Drawn]]:
    """Make the draw of an augmentation with one operation of the same name, applied with probability p."""

    def draw(one: Augmentation, u: Uniforms) -> list[Drawn]:
        values = np.rint(value(one, u[:, 1])).astype(np.int16)
        codes = np.full(len(u), CODES[one.kind], np.uint8)
        return [_with_probability(one, u[:, 0], codes, values)]

    return draw


def _angle(one: Augmentation, u: Uniforms) -> Uniforms:
    return (2 * u - 1) * one.number("degrees") * 100


def _sigma(one: Augmentation, u: Uniforms) -> Uniforms:
    low, high = one.range("sigma")
    return (low + u * (high - low)) * UNIT / REFERENCE_SIDE


def _threshold(one: Augmentation, u: Uniforms) -> Uniforms:
    return np.full_like(u, one.number("threshold"))


def _nothing(one: Augmentation, u: Uniforms) -> Uniforms:
    return np.zeros_like(u)


def _draw_erase(one: Augmentation, u: Uniforms) -> npt.NDArray[np.uint16]:
    """Draw torchvision's RandomErasing (Zhong et al., 2020): the first of ten shapes that fits; none if none does."""
    # Columns of u: 0 to 9 areas, 10 to 19 ratios, 20 top, 21 left, 22 whether to erase.
    (scale_lo, scale_hi), (ratio_lo, ratio_hi) = one.range("scale"), one.range("ratio")
    area = scale_lo + u[:, :ERASE_ATTEMPTS] * (scale_hi - scale_lo)
    log_lo, log_hi = math.log(ratio_lo), math.log(ratio_hi)
    ratio = np.exp(log_lo + u[:, ERASE_ATTEMPTS : 2 * ERASE_ATTEMPTS] * (log_hi - log_lo))
    heights, widths = np.sqrt(area * ratio), np.sqrt(area / ratio)
    fits = (heights < 1) & (widths < 1)
    rows, chosen = np.arange(len(u)), fits.argmax(axis=1)
    height, width = heights[rows, chosen], widths[rows, chosen]
    top, left = u[:, 20] * (1 - height), u[:, 21] * (1 - width)
    there = fits.any(axis=1) & (u[:, 22] < one.number("p"))
    # Rounded down, so that corner + side never exceeds 1: floor(a) + floor(b) <= floor(a + b).
    boxes = np.floor(np.stack([top, left, height, width], axis=1) * (1 << BOX_UNIT_BITS)) * there[:, None]
    drawn: npt.NDArray[np.uint16] = boxes.astype(np.uint16)
    return drawn


class _Option(NamedTuple):
    default: float | Range
    bounds: Range
    whole: bool = False


class _Kind(NamedTuple):
    options: dict[str, _Option]
    slots: Callable[[dict[str, float | Range]], int]
    draw: Callable[[Augmentation, Uniforms], list[Drawn]]


def _one(_: dict[str, float | Range]) -> int:
    return 1


_P = _Option(1.0, (0, 1))
# Each operation takes two random words.
_LARGEST_RANDAUGMENT = WORDS // 2

AUGMENTATION_KINDS: dict[str, _Kind] = {
    "randaugment": _Kind(
        {"n": _Option(2.0, (1, _LARGEST_RANDAUGMENT), True), "m": _Option(9.0, (0, BINS - 1), True)},
        lambda options: int(options["n"]),  # type: ignore[arg-type]
        _draw_randaugment,
    ),
    "trivialaugment": _Kind({}, _one, _draw_trivialaugment),
    "colorjitter": _Kind(
        {
            # At most 30: a factor of 1 + 30, in units of 1/1,000, has to fit into int16.
            "brightness": _Option(0.4, (0, 30)),
            "contrast": _Option(0.4, (0, 30)),
            "saturation": _Option(0.4, (0, 30)),
            "hue": _Option(0.1, (0, 0.5)),
            "p": _P,
        },
        # Always four slots, unused ones with code 0: all crops of a label set have the same number (docs/format.md).
        lambda _: 4,
        _draw_colorjitter,
    ),
    "rotate": _Kind({"degrees": _Option(15.0, (0, 180)), "p": _P}, _one, _single(_angle)),
    "blur": _Kind({"sigma": _Option((0.1, 2.0), (0, 100)), "p": _P}, _one, _single(_sigma)),
    "grayscale": _Kind({"p": _Option(0.2, (0, 1))}, _one, _single(_nothing)),
    "solarize": _Kind(
        {"threshold": _Option(128.0, (0, 256), True), "p": _P},
        _one,
        _single(_threshold),
    ),
    "equalize": _Kind({"p": _P}, _one, _single(_nothing)),
    "autocontrast": _Kind({"p": _P}, _one, _single(_nothing)),
    "invert": _Kind({"p": _P}, _one, _single(_nothing)),
    "erase": _Kind(
        {
            "p": _Option(0.25, (0, 1)),
            "scale": _Option((0.02, 0.33), (1e-4, 1)),
            "ratio": _Option((0.3, 3.3), (1e-2, 100)),
        },
        lambda _: 0,
        lambda _, __: [],
    ),
}


def _name_and_value(text: str, kind: str, pieces: Sequence[str], position: int) -> tuple[str, str]:
    """Return the name and the value of an option. Raises UsageError for a value whose name cannot be told."""
    piece = pieces[position]
    name, equals, value = piece.partition("=")
    if equals:
        return name.strip(), value
    # As in a call in Python. In `p=0.5,0.4` the second value could be meant for the first option or for the second.
    if not piece.strip() or any("=" in before for before in pieces[:position]):
        raise UsageError(
            f"augmentation {text!r}: value {position + 1} needs a name: values without names come first, none is left "
            f"out; {_names(kind)}"
        )
    # `p` needs its name, so that colorjitter's four values stand in the order of torchvision's arguments.
    positional = [option for option in AUGMENTATION_KINDS[kind].options if option != "p"]
    if position >= len(positional):
        raise UsageError(f"augmentation {text!r}: too many values without names; {_names(kind)}")
    return positional[position], piece


def _names(kind: str) -> str:
    names = ", ".join(
        f"{name} (default {_text(option.default)})" for name, option in AUGMENTATION_KINDS[kind].options.items()
    )
    return f"its options are {names}" if names else "it has no options"


def _text(value: float | Range) -> str:
    return f"{value[0]:g}..{value[1]:g}" if isinstance(value, tuple) else f"{value:g}"


def _number_or_range(text: str, name: str, value: str, wants_range: bool) -> float | Range:
    low, dots, high = value.partition("..")
    try:
        numbers = (float(low), float(high)) if dots else (float(low), float(low))
    except ValueError as error:
        raise UsageError(f"augmentation {text!r}: {name} must be a number, got {value!r}") from error
    if dots and not wants_range:
        raise UsageError(f"augmentation {text!r}: {name} must be one number, not a range")
    return numbers if wants_range else numbers[0]
