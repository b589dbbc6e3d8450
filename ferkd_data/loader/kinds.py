"""Crop kinds in a loader: which of them a batch has, how many crops of each, and at which size.

The kinds of a batch are made from the same images, each decoded once. Each kind has a `BatchMaker` of its own for its
labels, draws, targets and mixing; the first one reads and decodes for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

from ferkd_data.crop_kinds import DEFAULT_SIZE, MAX_SIZE
from ferkd_data.errors import UsageError
from ferkd_data.label_set import LabelSet

DEFAULT_CROPS = 4
"""Crops per image of a loader without kinds (FKD's M)."""
T = TypeVar("T")


class KindOfBatch(NamedTuple):
    """A crop kind as a loader gives it."""

    name: str
    crops_per_image: int
    """M of this kind."""
    size: int
    """S of this kind."""


def default_size(labels: LabelSet) -> int:
    """Return the side of crops that a student gets unless the user says otherwise: that of their kind, else 224."""
    return labels.crop_kinds[0].size if labels.crop_kinds else DEFAULT_SIZE


def check_one_kind(labels: LabelSet) -> None:
    """Raise UsageError for crops of several kinds: at one size, they are not what they were drawn for."""
    kinds = labels.crop_kinds
    if len(kinds) > 1:
        example = ", ".join(f"{kind.name!r}: 2" for kind in kinds)
        raise UsageError(
            f"{labels.location}: has crops of the kinds {_names(labels)}, which do not go into batches of one size. "
            f"Train on one of them, labels.crop_kind({kinds[0].name!r}), or on several with "
            f"CropLoader(kinds={{{example}}})"
        )


def crops_of_batch(labels: LabelSet, kinds: Any, crops_per_image: Any, size: Any) -> dict[str, Any]:
    """Return the settings `kinds`, `crops_per_image` and `size` of a loader, completed.

    Raises UsageError for arguments that exclude each other or cannot be right.
    """
    if kinds is None:
        own = default_size(labels) if size is None else size
        return {"crops_per_image": DEFAULT_CROPS if crops_per_image is None else crops_per_image, "size": own}
    if crops_per_image is not None:
        raise UsageError("crops_per_image and kinds exclude each other: kinds says how many crops of each kind")
    chosen = kinds_of_batch(labels, kinds, size)
    # The first kind leads: batch_size counts its crops.
    return {"kinds": chosen, "crops_per_image": chosen[0].crops_per_image, "size": chosen[0].size}


def kinds_of_batch(labels: LabelSet, kinds: Any, size: Any) -> tuple[KindOfBatch, ...]:
    """Check the arguments `kinds` and `size` of a loader. Raises UsageError that says what is wrong with them."""
    # A list of names would leave open how many crops of each; an empty dict would be a loader without batches.
    if not isinstance(kinds, Mapping) or not kinds:
        raise UsageError(
            f'kinds is a dict of crops per image by kind, such as {{"global": 2, "local": 6}}; got {kinds!r}'
        )
    if not labels.crop_kinds:
        raise UsageError(
            f"{labels.location}: was built without crop kinds (--crop-kinds), so it has none for kinds={kinds!r}"
        )
    known = {kind.name: kind for kind in labels.crop_kinds}
    if size is not None and not isinstance(size, Mapping):
        raise UsageError(f'with kinds, size is a dict by kind, such as {{"local": 96}}, or is left out; got {size!r}')
    # Sizes of some kinds may be given, and the others keep those of the build.
    sizes = dict(size or {})
    for argument, names, among in (("kinds", kinds, known), ("size", sizes, kinds)):
        unknown = [name for name in names if name not in among]
        if unknown:
            there = ", ".join(map(str, among))
            raise UsageError(f"{argument} names the crop kind {unknown[0]!r}; there are {there} ({labels.location})")
    return tuple(
        KindOfBatch(
            name,
            _number(f"kinds[{name!r}]", count, 65535, "crops of each image in a batch"),
            _number(f"size[{name!r}]", sizes.get(name, known[name].size), MAX_SIZE, "a side in pixels"),
        )
        for name, count in kinds.items()
    )


def by_kind(kinds: Sequence[KindOfBatch], values: Sequence[T]) -> dict[str, T]:
    """Return the values of a batch's kinds by name."""
    return {kind.name: value for kind, value in zip(kinds, values, strict=True)}


def _number(name: str, value: Any, most: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) <= most:
        raise UsageError(f"{name} must be a whole number in 1..{most} ({what}), got {value!r}")
    return int(value)


def _names(labels: LabelSet) -> str:
    return ", ".join(kind.name for kind in labels.crop_kinds)
