"""Compare lists of class names: whether they may number the same classes alike."""

from __future__ import annotations

import re
from collections.abc import Sequence

CONTRADICTIONS = 0.1
"""Share of the names known to both sides that may have other numbers: lists of one data set differ in a few names."""
NAMES_SHOWN = 3


def order_note(names: Sequence[str]) -> str | None:
    """Explain how class names were numbered where programs sort them differently; None where all agree.

    torchvision and datasets sort by characters, timm as people read: with numbers by their value, whatever the case.

    >>> order_note(["1", "10", "2"])
    "class names are sorted by characters, as torchvision does, so '10' is class 1; timm's own reader makes '2' class 1"
    """
    natural = sorted(names, key=_natural_key)
    first = next((number for number, name in enumerate(names) if natural[number] != name), None)
    if first is None:
        return None
    return (
        f"class names are sorted by characters, as torchvision does, so {names[first]!r} is class {first}; timm's own "
        f"reader makes {natural[first]!r} class {first}"
    )


def _natural_key(name: str) -> list[int | str]:
    # Splitting at a group gives texts and numbers in turn, so that only like is compared with like.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def contradictions(ours: Sequence[str] | None, theirs: Sequence[str] | None) -> str:
    """Describe the first classes that two lists of names have in another order; empty where the lists may agree."""
    if ours is None or theirs is None or len(ours) != len(theirs):
        return ""
    known, wrong = _common_classes(ours, theirs)
    # Few common names mean another vocabulary, such as WordNet IDs beside English: nothing can be compared.
    if len(known) < max(2, len(ours) / 2) or not wrong:
        return ""
    # Where all names are known, one wrong number is a fault. Where only most are, a word may mean something else there.
    if len(known) < len(ours) and len(wrong) <= CONTRADICTIONS * len(known):
        return ""
    return "; ".join(f"class {i} is {ours[i]!r} here and {theirs[i]!r} there" for i in wrong[:NAMES_SHOWN])


def _common_classes(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[int], list[int]]:
    """List our classes whose name both sides have, and those among them that have another number on their side.

    A synonym that two of our classes have tells nothing. ImageNet has two cranes and two maillots, which some lists of
    its names tell apart and some do not.
    """
    numbers = _numbers_by_synonym(theirs)
    unambiguous = {synonym for synonym, found in _numbers_by_synonym(ours).items() if len(found) == 1}
    known, wrong = [], []
    for number, name in enumerate(ours):
        found = set().union(*(numbers.get(synonym, set()) for synonym in _synonyms(name) & unambiguous))
        if found:
            known.append(number)
            if number not in found:
                wrong.append(number)
    return known, wrong


def _numbers_by_synonym(names: Sequence[str]) -> dict[str, set[int]]:
    """Map each synonym to the classes that have it."""
    numbers: dict[str, set[int]] = {}
    for number, name in enumerate(names):
        for synonym in _synonyms(name):
            numbers.setdefault(synonym, set()).add(number)
    return numbers


def _synonyms(name: str) -> set[str]:
    """Split a name at its commas; case, underscores and hyphens do not count. `tench, Tinca tinca` has two synonyms."""
    plain = name.casefold().replace("_", " ").replace("-", " ")
    return {" ".join(piece.split()) for piece in plain.split(",")}
