"""Labels as people store them, to class numbers: 3, 3.0, "3", "cat", -1, nothing, or what makes no sense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ferkd_data.images.class_list import ClassList
from ferkd_data.images.refs import MAX_TARGET

MAX_SHOWN = 40
"""Characters of a label in a message."""
MAX_SUFFIXES = 12
"""Kinds of members that are remembered for a message."""


def class_number(label: Any, classes: ClassList | None) -> int | None:
    """The class that a label names; None for a label that says "unknown" (missing, empty, negative, NaN).

    Raises KeyError for a text that is in no list of classes, ValueError for what is no class at all.
    """
    if label is None or (isinstance(label, float) and label != label):
        return None
    if isinstance(label, str):
        return _number_of_text(label, classes)
    if isinstance(label, float) and not label.is_integer():
        raise ValueError(label)
    if not isinstance(label, (int, float)):
        raise ValueError(label)
    number = int(label)
    if number > MAX_TARGET:
        raise ValueError(label)
    return number if number >= 0 else None


def _number_of_text(text: str, classes: ClassList | None) -> int | None:
    text = text.strip()
    if not text:
        return None
    if classes is not None and text in classes.by_text:
        return classes.by_text[text]
    try:
        return class_number(int(text), None)
    except ValueError:
        raise KeyError(text) from None


@dataclass
class LabelCounts:
    """Counts of the labels of a listing. A label that was not understood becomes a note, and the image stays."""

    images: int = 0
    known: int = 0
    texts: int = 0
    """Texts that no list of classes has."""
    senseless: int = 0
    first_text: str = ""
    first_senseless: str = ""
    suffixes: set[str] = field(default_factory=set)

    def count(self, label: Any, classes: ClassList | None, suffixes: Sequence[str] = ()) -> int | None:
        """The class number of one image, None where it is unknown."""
        self.images += 1
        if len(self.suffixes) < MAX_SUFFIXES:
            self.suffixes.update(suffixes)
        number = None
        try:
            number = class_number(label, classes)
        except KeyError:
            self.first_text = self.first_text or str(label)[:MAX_SHOWN]
            self.texts += 1
        except ValueError:
            self.first_senseless = self.first_senseless or repr(label)[:MAX_SHOWN]
            self.senseless += 1
        self.known += number is not None
        return number

    def notes(self, *, has_classes: bool, where: str = "") -> list[str]:
        """A sentence for each thing that left images without ground truth. `where` says where labels are looked for."""
        found = []
        if self.texts:
            how = "are not in the classes file" if has_classes else "need --classes to be numbered"
            found.append(f"{_images(self.texts)} with labels that {how}, such as {self.first_text!r}: no ground truth")
        if self.senseless:
            found.append(f"{_images(self.senseless)} with labels that name no class, such as {self.first_senseless}")
        if self.images and not self.known and not self.texts and not self.senseless:
            found.append(f"no ground truth was found{where}")
        return found


def _images(count: int) -> str:
    return f"{count:,} image" if count == 1 else f"{count:,} images"
