"""The file that says which class has which number: a line per class, and the other forms that people have.

Read are: one folder or name in a line, with a tab before a name to show (also timm's class maps); Kaggle's
LOC_synset_mapping.txt (a WordNet ID, a space, names); and JSON: a list of names, {"0": ["n01440764", "tench"], …} as
Keras and torchvision have it, {"0": "tench", …} or {"tench": 0, …}.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ferkd_data.errors import SourceError

WORDNET_LINE = re.compile(r"(n\d{8})[ ,]+(\S.*)")
NUMBERED_NAME = re.compile(r"\d+(\s|$)")


@dataclass(frozen=True)
class ClassList:
    """Classes in the order of the teachers' outputs."""

    where: str
    """The file, or what else it comes from, for messages."""
    folders: tuple[str, ...]
    names: tuple[str, ...]
    """To show; a class without one is shown by its folder."""

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Folder -> class number. Raises SourceError for a folder that is listed twice."""
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
    def by_text(self) -> dict[str, int]:
        """Folder or name -> class number, without names that several classes share."""
        found: dict[str, int] = {}
        shared: set[str] = set()
        for number, name in enumerate(self.names):
            if found.setdefault(name, number) != number:
                shared.add(name)
        by_name = {name: number for name, number in found.items() if name not in shared}
        return {**by_name, **{folder: number for number, folder in enumerate(self.folders) if folder not in shared}}


def read_class_list(path: Path) -> ClassList:
    """Raises SourceError that names the line at fault."""
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
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: is not UTF-8 ({error}); save it as UTF-8 text") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read as a list of classes ({error.strerror})") from error


def _from_lines(path: Path, text: str) -> list[tuple[str, str]]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if lines and all(map(WORDNET_LINE.fullmatch, lines)):
        return _from_wordnet_lines(path, lines)
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


def _from_json(path: Path, text: str) -> list[tuple[str, str]]:
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise SourceError(f"{path}: is not JSON ({error})") from error
    if isinstance(content, dict) and content and all(type(value) is int for value in content.values()):
        content = {str(number): name for name, number in content.items()}
    if isinstance(content, dict):
        numbers = [str(number) for number in range(len(content))]
        if set(numbers) != set(content):
            raise SourceError(f"{path}: its classes are not numbered 0 to {len(content) - 1}, each once")
        content = [content[number] for number in numbers]
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
