"""Kinds of crops for multi-crop students: ranges of crop numbers, each with its own distribution and size.

A crop kind is written `NAME:n=CROPS,OPTION,…`, as in `global:scale=0.25..1,n=20` or
`local:scale=0.05..0.25,size=96,n=80`. Kinds take the crop numbers in the given order: with these two, crops 0 to 19 of
every image are global and crops 20 to 99 are local.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ferkd_data.crops import CropDistribution, Crops, draw_crops
from ferkd_data.errors import UsageError

NAME_PATTERN = r"[A-Za-z][A-Za-z0-9_-]{0,31}"
OPTIONS = ("n", "scale", "ratio", "hflip", "size")
MAX_KINDS = 16
MAX_SIZE = 8192
"""Largest side in pixels that a student's crop may have."""
DEFAULT_SIZE = 224
MOST_BLOCKS = 32
"""Most block files of a shard that the choice of a block size may lead to unless the user asked for that size."""


@dataclass(frozen=True, kw_only=True)
class CropKind:
    """A kind of crops: how many an image has of it, how they are drawn, and the size that a student gets them in.

    Raises UsageError for values out of range.

    >>> fd.CropKind(name="local", crops=80, size=96, distribution=fd.CropDistribution(scale=(0.05, 0.25)))
    CropKind(name='local', crops=80, size=96, distribution=CropDistribution(scale=(0.05, 0.25), ratio=(0.75, ...
    """

    name: str
    """A letter, then up to 31 letters, digits, `_` and `-`."""
    crops: int
    """Crops of this kind that each image has."""
    size: int = DEFAULT_SIZE
    """Side in pixels that the loader cuts these crops to; each teacher cuts the same box to its own input size."""
    distribution: CropDistribution = field(default_factory=CropDistribution)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(NAME_PATTERN, self.name):
            raise UsageError(
                f"the name of a crop kind is a letter, then up to 31 letters, digits, _ and -; got {self.name!r}"
            )
        for name, value, most in (("n", self.crops, 65535), ("size", self.size, MAX_SIZE)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise UsageError(f"crop kind {self.name!r}: {name} must be a whole number in 1..{most}, got {value!r}")

    @classmethod
    def parse(
        cls, text: str, *, distribution: CropDistribution | None = None, known: Sequence[CropKind] = ()
    ) -> CropKind:
        """Parse `NAME:n=CROPS,scale=LO..HI,ratio=LO..HI,hflip=P,size=PIXELS`, options in any order.

        Options that are not given are those of the kind of this name in `known`; for a new name they are those of
        `distribution`, and a size of 224. Only `n` must be given.

        Raises UsageError for an unknown option, and for values out of range.
        """
        name, _, rest = text.strip().partition(":")
        given: dict[str, str] = {}
        for piece in filter(None, rest.split(",")):
            option, equals, value = (part.strip() for part in piece.partition("="))
            if option not in OPTIONS or not equals or option in given:
                raise UsageError(
                    f"crop kind {text!r}: {piece!r} is not one of its options, or is given twice; they are "
                    f"{', '.join(f'{name}=' for name in OPTIONS)}, as in local:scale=0.05..0.25,size=96,n=80"
                )
            given[option] = value
        if "n" not in given:
            raise UsageError(
                f"crop kind {text!r}: say how many crops of it each image gets, as in {name or 'local'}:n=20"
            )
        base = next((kind for kind in known if kind.name == name), None)
        start = distribution or CropDistribution()
        size = DEFAULT_SIZE
        if base is not None:
            start, size = base.distribution, base.size
        try:
            drawn = CropDistribution(
                scale=_range(text, "scale", given["scale"]) if "scale" in given else start.scale,
                ratio=_range(text, "ratio", given["ratio"]) if "ratio" in given else start.ratio,
                hflip=_number(text, "hflip", given["hflip"]) if "hflip" in given else start.hflip,
            )
        except UsageError as error:
            raise error if str(error).startswith("crop kind") else UsageError(f"crop kind {text!r}: {error}") from error
        return cls(
            name=name,
            crops=_whole(text, "n", given["n"]),
            size=_whole(text, "size", given["size"]) if "size" in given else size,
            distribution=drawn,
        )

    def __str__(self) -> str:
        drawn = self.distribution
        return (
            f"{self.name}:scale={drawn.scale[0]}..{drawn.scale[1]},ratio={drawn.ratio[0]}..{drawn.ratio[1]},"
            f"hflip={drawn.hflip},size={self.size},n={self.crops}"
        )

    @property
    def summary(self) -> str:
        """The kind in words, rounded, as in `80 crops for students of 96 px, scale 0.05..0.25, ratio 0.75..1.33, …`."""
        drawn = self.distribution
        return (
            f"{self.crops} crops for students of {self.size} px, scale {drawn.scale[0]:g}..{drawn.scale[1]:g}, ratio "
            f"{drawn.ratio[0]:.3g}..{drawn.ratio[1]:.3g}, hflip {drawn.hflip:g}"
        )

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> CropKind:
        """Make a kind of what `dataclasses.asdict` gave, also after a detour through JSON."""
        drawn: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values["distribution"].items()}
        return cls(**{**values, "distribution": CropDistribution(**drawn)})


def make_crop_kinds(
    kinds: Iterable[str | CropKind], *, distribution: CropDistribution | None = None, known: Sequence[CropKind] = ()
) -> tuple[CropKind, ...]:
    """Parse kinds, in order; see `CropKind.parse`. Raises UsageError, also for two kinds of one name."""
    if isinstance(kinds, (str, CropKind)):
        raise UsageError(f"crop_kinds is a list of crop kinds, as in crop_kinds=[{str(kinds)!r}]")
    made: list[CropKind] = []
    for kind in kinds:
        if isinstance(kind, CropKind):
            made.append(kind)
        elif isinstance(kind, str):
            # Several may be written behind one another, as `--crop-kinds "global:n=20 local:n=80"` has them.
            made += [CropKind.parse(text, distribution=distribution, known=known) for text in kind.split()]
        else:
            raise UsageError(f"a crop kind is a CropKind, or text such as 'local:size=96,n=80'; got {kind!r}")
    names = [kind.name for kind in made]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"crop kind {twice!r} is given twice; each kind has a name of its own")
    if len(made) > MAX_KINDS:
        raise UsageError(f"{len(made)} crop kinds are more than a label set may have ({MAX_KINDS})")
    return tuple(made)


def kind_starts(kinds: Sequence[CropKind]) -> list[int]:
    """Return the number of each kind's first crop.

    >>> kind_starts([CropKind(name="global", crops=20), CropKind(name="local", crops=80)])
    [0, 20]
    """
    return [0, *itertools.accumulate(kind.crops for kind in kinds)][: len(kinds)]


def kind_of_crop(kinds: Sequence[CropKind], crop: int) -> CropKind | None:
    """Return the kind of crop number `crop`; None without kinds."""
    found = None
    for kind, start in zip(kinds, kind_starts(kinds), strict=True):
        found = kind if crop >= start else found
    return found


def draw_crops_of_kinds(
    key: str, height: int, width: int, *, seed: int, first: int, count: int, kinds: Sequence[CropKind]
) -> Crops:
    """Draw crops number `first` .. `first + count - 1` of the image `key`, each from its own kind's distribution.

    As `draw_crops`, a crop is a function of (seed, key, crop number), the image's size and its kind alone.
    """
    parts = []
    for kind, start in zip(kinds, kind_starts(kinds), strict=True):
        begin, end = max(first, start), min(first + count, start + kind.crops)
        if begin < end:
            drawn = {"first": begin, "count": end - begin, "distribution": kind.distribution}
            parts.append(draw_crops(key, height, width, seed=seed, **drawn))  # type: ignore[arg-type]
    return Crops(
        boxes=np.concatenate([part.boxes for part in parts]), flip=np.concatenate([part.flip for part in parts])
    )


def fits_blocks(kinds: Sequence[CropKind], crops_per_block: int) -> bool:
    """Return whether no crop block holds crops of two kinds."""
    return all(start % crops_per_block == 0 for start in kind_starts(kinds))


def block_of_kinds(kinds: Sequence[CropKind], at_most: int) -> int:
    """Return the largest block size up to `at_most` with which no crop block holds crops of two kinds.

    So a trainer who wants one kind fetches the files of that kind alone. Raises UsageError where only tiny blocks
    would do.

    >>> block_of_kinds([CropKind(name="global", crops=20), CropKind(name="local", crops=80)], 50)
    20
    """
    starts = kind_starts(kinds)
    common = math.gcd(*starts)
    if not common or common % at_most == 0:
        return at_most
    block = max(divisor for divisor in range(1, at_most + 1) if common % divisor == 0)
    blocks = -(-(starts[-1] + kinds[-1].crops) // block)
    if blocks > MOST_BLOCKS:
        positions = ", ".join(f"{kind.name} at crop {start}" for kind, start in zip(kinds, starts, strict=True))
        raise UsageError(
            f"crop kinds begin within crop blocks of {at_most} ({positions}), and blocks of {block}, which would fit, "
            f"make {blocks} files of every shard. Give all kinds but the last a number of crops with a larger common "
            f"divisor, such as {_rounder(kinds, at_most)}, or ask for --crops-per-block {block}"
        )
    return block


def _rounder(kinds: Sequence[CropKind], at_most: int) -> str:
    """Return the kinds before the last with their crops rounded up to multiples of one number."""
    step = min(10, at_most)
    return ", ".join(f"{kind.name}:n={-(-kind.crops // step) * step}" for kind in kinds[:-1])


def _whole(text: str, name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UsageError(f"crop kind {text!r}: {name} must be a whole number, got {value!r}") from error


def _number(text: str, name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"crop kind {text!r}: {name} must be a number, got {value!r}") from error


def _range(text: str, name: str, value: str) -> tuple[float, float]:
    low, dots, high = value.partition("..")
    try:
        return float(low), float(high if dots else low)
    except ValueError as error:
        raise UsageError(f"crop kind {text!r}: {name} must be LO..HI, such as 0.25..1, got {value!r}") from error
