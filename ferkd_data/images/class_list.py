"""Number the classes: read `--classes FILE`, and turn the labels stored beside images into class numbers.

Forms of the file:

- text, one class per line: a folder or name, optionally a tab and a name to show (timm's class maps are of this form)
- Kaggle's LOC_synset_mapping.txt: a WordNet ID, a space, names
- JSON: a list of names; {"0": ["n01440764", "tench"], …} as Keras and torchvision have it; {"0": "tench", …}; or
  {"tench": 0, …}

Labels beside images may be 3, 3.0, "3", "cat", -1, NaN or missing. One that is not understood leaves its image without
ground truth, and a note says so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ferkd_data.errors import LabelSetError, SourceError
from ferkd_data.images.refs import MAX_TARGET
from ferkd_data.storage import read_text

WORDNET_LINE = re.compile(r"(n\d{8})[ ,]+(\S.*)")
"""A line of Kaggle's LOC_synset_mapping.txt: n01440764 tench, Tinca tinca."""
NUMBERED_NAME = re.compile(r"\d+(\s|$)")
"""A name that begins with a number, as in the development kit's map_clsloc.txt: n02119789 1 kit_fox."""


WHOLE_NUMBER = re.compile(r"[-+]?\d{1,18}(\.0*)?")

NUMBERED_LINE = re.compile(r"(\d{1,18})\s*?([\t,:;])\s*(\S.*)")
"""A line with a class number or a folder that is called so: `0<tab>tench`, `0,tench`, `0: tench`."""


@dataclass(frozen=True)
class ClassList:
    """Classes in the order of the teachers' outputs."""

    where: str
    """Origin of the list for messages: a file, a folder or a column."""
    folders: tuple[str, ...]
    """Class folders, or labels as texts, in the order of the class numbers."""
    names: tuple[str, ...]
    """Names to show, in the same order; the folder where a class has no name."""

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Class number of each folder. Raises SourceError for a folder that is listed twice."""
        numbers: dict[str, int] = {}
        for number, folder in enumerate(self.folders):
            if folder in numbers:
                raise SourceError(
                    f"{self.where}: lists {folder!r} as class {numbers[folder]} and again as class {number}; it has "
                    "to name class folders, each once"
                )
            numbers[folder] = number
        return numbers

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the folders and names, whatever the file's form."""
        return hashlib.sha256(json.dumps([self.folders, self.names]).encode()).hexdigest()

    @cached_property
    def by_text(self) -> dict[str, int]:
        """Class number of each folder and of each name; texts that several classes share are left out."""
        by_folder, shared_folders = _numbered(self.folders)
        by_name, shared_names = _numbered(self.names)
        shared = shared_folders | shared_names
        return {text: number for text, number in {**by_name, **by_folder}.items() if text not in shared}


def _numbered(texts: Sequence[str]) -> tuple[dict[str, int], set[str]]:
    """Return the class number of each text, and the texts that several classes have."""
    found: dict[str, int] = {}
    shared = {text for number, text in enumerate(texts) if found.setdefault(text, number) != number}
    return found, shared


def read_class_list(path: Path) -> ClassList:
    """Read a file of classes in any of the forms above. Raises SourceError that names the line at fault."""
    text = _read_text(path)
    if path.suffix.lower() == ".json" or text.lstrip().startswith(("{", "[")):
        pairs = _from_json(path, text)
    else:
        pairs = _from_lines(path, text)
    if not pairs:
        raise SourceError(f"{path}: has no classes; it needs one line per class")
    return ClassList(str(path), tuple(folder for folder, _ in pairs), tuple(name for _, name in pairs))


def _read_text(path: Path) -> str:
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise SourceError(f"{path}: pickles can run code and are not read; write one class in a line")
    try:
        return read_text(path)
    except LabelSetError as error:
        raise SourceError(f"{error}; write the classes to a file first") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: is not UTF-8 ({error}); save it as UTF-8 text") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read as a list of classes ({error.strerror})") from error


def _from_lines(path: Path, text: str) -> list[tuple[str, str]]:
    lines = [line.rstrip() for line in text.split("\n")]
    # Empty lines at the end are an editor's. Between others they would move all classes behind them.
    while lines and not lines[-1]:
        lines.pop()
    # All lines, since a folder may be called n01440764 in a file of another form.
    if lines and all(map(WORDNET_LINE.fullmatch, lines)):
        return _from_wordnet_lines(path, lines)
    numbered = [match for match in map(NUMBERED_LINE.fullmatch, lines) if match]
    if lines and len(numbered) == len(lines):
        return _from_numbered_lines(path, numbered)
    pairs = []
    for number, line in enumerate(lines, 1):
        folder, _, name = line.partition("\t")
        folder = folder.strip()
        if not folder:
            raise SourceError(f"{path}: line {number} is empty; every line is a class, in the order of the outputs")
        pairs.append((folder, name.strip() or folder))
    return pairs


def _from_wordnet_lines(path: Path, lines: list[str]) -> list[tuple[str, str]]:
    found = [(match[1], match[2].strip()) for match in map(WORDNET_LINE.fullmatch, lines) if match]
    if all(NUMBERED_NAME.match(name) for _, name in found):
        raise SourceError(
            f"{path}: its lines carry class numbers of their own ({lines[0]!r}), as in ImageNet's development kit, "
            "whose order is not that of common teachers; give a file whose lines are in the order of the outputs, such "
            "as LOC_synset_mapping.txt"
        )
    return found


def _from_numbered_lines(path: Path, lines: list[re.Match[str]]) -> list[tuple[str, str]]:
    """Read lines such as `0<tab>tench` or `0: tench`. Raises SourceError for class numbers that are not in order."""
    numbers, ascending = [int(line[1]) for line in lines], list(range(len(lines)))
    # Behind a tab, other numbers than 0 .. C - 1 are the names of class folders.
    are_folders = all(line[2] == "\t" for line in lines) and sorted(numbers) != ascending
    if numbers != ascending and not are_folders:
        raise SourceError(
            f"{path}: numbers its lines ({lines[0][0]!r}), but not from 0 in their order, and a line's place is the "
            "number of its class; sort the lines and write the names alone, or, where the numbers are class folders, "
            "only these"
        )
    return [(line[1], line[3].strip()) for line in lines]


def _from_json(path: Path, text: str) -> list[tuple[str, str]]:
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is not JSON ({error})") from error
    if isinstance(content, dict):
        # {"tench": 0, …} is turned around. `type` and not isinstance, since True is an int.
        names_first = all(type(value) is int for value in content.values())
        numbered = {str(number): name for name, number in content.items()} if names_first else content
        # Where two names have one number, there are fewer numbers than names.
        numbers = [str(number) for number in range(len(content))]
        if set(numbers) != set(numbered):
            raise SourceError(f"{path}: its classes are not numbered 0 to {len(content) - 1}, each once")
        content = [numbered[number] for number in numbers]
    # None stands for an entry that is not understood; one of them refuses the whole file.
    pairs = [_pair(entry) for entry in content] if isinstance(content, list) else [None]
    if None in pairs:
        raise SourceError(
            f'{path}: needs a list of names, or an object such as {{"0": "tench"}} or {{"0": ["n01440764", "tench"]}}'
        )
    return [pair for pair in pairs if pair]


def _pair(entry: Any) -> tuple[str, str] | None:
    if isinstance(entry, str) and entry:
        return entry, entry
    if isinstance(entry, list) and 1 <= len(entry) <= 2 and all(isinstance(part, str) and part for part in entry):
        return entry[0], entry[-1]
    return None


MAX_SHOWN = 40
"""Characters of a label in a message."""
MAX_SUFFIXES = 12
"""Suffixes of tar members that are kept for a message."""


def class_number(label: Any, classes: ClassList | None) -> int | None:
    """Return the class number that a label names; None for an unknown class (missing, empty, negative, NaN).

    Raises KeyError for a text that `classes` does not list, ValueError for a value that cannot name a class.
    """
    # NaN is the only number that differs from itself.
    if label is None or (isinstance(label, float) and label != label):
        return None
    if isinstance(label, str):
        return _number_of_text(label, classes)
    if isinstance(label, float) and not label.is_integer():
        raise ValueError(label)
    if not isinstance(label, (int, float)):
        raise ValueError(label)
    # Booleans and whole floats arrive here too: columns of labels hold 3.0 where some values are missing.
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
    if not is_number(text):
        raise KeyError(text)
    return class_number(int(text.partition(".")[0]), None)


def is_number(text: str) -> bool:
    """Return whether a label that is a text is a class number, such as "3" or, out of a column with gaps, "3.0"."""
    return WHOLE_NUMBER.fullmatch(text.strip()) is not None


@dataclass
class LabelCounts:
    """Accumulator of the labels of a listing, for notes on labels that were not understood."""

    images: int = 0
    known: int = 0
    texts: int = 0
    """Texts that the list of classes does not have."""
    senseless: int = 0
    """Values that cannot name a class."""
    first_text: str = ""
    first_senseless: str = ""
    suffixes: set[str] = field(default_factory=set)

    def count(self, label: Any, classes: ClassList | None, suffixes: Sequence[str] = ()) -> int | None:
        """Count the label of one image and return its class number; None where the class is unknown."""
        self.images += 1
        # Samples have a few suffixes; a damaged tar may have a new one in every sample.
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
        """Explain in sentences why images have no ground truth. `where` says where labels were looked for."""
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
