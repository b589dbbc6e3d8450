"""Class maps: train on other classes than the teacher's, from its stored soft labels.

Several of the teacher's classes may become one new class, and classes may be dropped. A target is recovered over the
teacher's classes first, and mapped then: with q the recovered distribution, new class j gets

    sum of q[c] over the old classes c that become j, divided by the sum of q over all classes that are kept.

A recovered target is sparse entries plus one floor f on every old class (see `targets`), so new class j has the floor
n[j] * f, where n[j] old classes become j. `SoftTargets` have one floor for all classes: it is that of the most common
n, and each class of another n gets an entry that holds the difference. Nothing is approximated.

Legend: B crops, R images, N crops per image, k stored classes, C old classes, D new classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import UsageError, nearest
from ferkd_data.labels.buckets import Thresholds, buckets_of
from ferkd_data.labels.rows import UNKNOWN_TARGET, class_index_dtype
from ferkd_data.targets import Floats

Ints: TypeAlias = npt.NDArray[np.int64]
DROPPED = -1
MAX_NEW_CLASSES = 2**24
NAMES_SHOWN = 5
"""Unknown names that an error lists."""
NewClasses: TypeAlias = "Mapping[Any, Any] | Sequence[Any] | npt.NDArray[Any]"


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassMap:
    """A map from old classes to new ones. Made by `make_class_map`."""

    new: Ints
    """(C,) the new class of each old one; -1 where it is dropped."""
    num_classes: int
    """D"""
    names: tuple[str, ...] | None
    """(D,) names of the new classes, where they are known."""

    def __post_init__(self) -> None:
        if self.new.max(initial=DROPPED) < 0:
            raise UsageError("this class map drops every class; at least one old class must become a new one")
        if self.new.min(initial=0) < DROPPED or self.new.max() >= self.num_classes:
            raise UsageError(f"new classes are numbered 0..{self.num_classes - 1}, got {self.new.max()}")
        if self.names is not None and len(self.names) != self.num_classes:
            raise UsageError(f"{self.num_classes} new classes have {len(self.names)} names")

    @cached_property
    def drops(self) -> bool:
        """Whether any old class is dropped."""
        return bool((self.new == DROPPED).any())

    @cached_property
    def is_renaming(self) -> bool:
        """Whether no class is dropped and no two become one, so that a crop is as difficult as before."""
        return not self.drops and bool((self._members <= 1).all())

    @cached_property
    def _members(self) -> Ints:
        """n, (D,): old classes that become each new one."""
        return np.bincount(self.new[self.new >= 0], minlength=self.num_classes)

    @cached_property
    def _common(self) -> int:
        """The most common n."""
        # argmax takes the smallest of equally common ones, so that the map's targets are always the same.
        return int(np.bincount(self._members).argmax())

    @cached_property
    def _uneven(self) -> Ints:
        """New classes of another n than the most common one."""
        return np.flatnonzero(self._members != self._common)

    def targets(self, target: npt.NDArray[np.integer[Any]]) -> Ints:
        """Return new ground truths, of the same shape; -1 where unknown or dropped."""
        known = target != UNKNOWN_TARGET
        # -1 would index the last class, so unknown targets look up class 0 and are put back.
        return np.where(known, self.new[np.where(known, target, 0)], UNKNOWN_TARGET)

    def then(self, after: ClassMap) -> ClassMap:
        """Return this map followed by another one, as one map."""
        kept = self.new >= 0
        new = np.where(kept, after.new[np.where(kept, self.new, 0)], DROPPED)
        return ClassMap(new=new, num_classes=after.num_classes, names=after.names)

    def first_kept(self, class_index: npt.NDArray[Any], class_prob: npt.NDArray[Any]) -> tuple[Any, Any]:
        """Return the same (B, k) columns with the most probable class that is kept in front.

        The recoveries `hard` and `label_smoothing` look at the first class alone, which may have been dropped.
        """
        # Columns descend by probability, so the first that is kept is the most probable. 0 where none is.
        first = (self.new[class_index] >= 0).argmax(axis=1)
        column = np.arange(class_index.shape[1])[None]
        # The two columns change places; the others stay.
        order = np.where(column == 0, first[:, None], np.where(column == first[:, None], 0, column))
        return np.take_along_axis(class_index, order, axis=1), np.take_along_axis(class_prob, order, axis=1)

    def distributions(self, index: Ints, weight: Floats, floor: Floats) -> tuple[Ints, Floats, Floats]:
        """Map recovered targets: distinct old classes `index` and their `weight` (B, k), `floor` (B,).

        Returns index and weight (B, K) and floor (B,) over the D new classes, K = k + the number of new classes that
        are not made of the most common number of old ones. If a target has no mass on any class that is kept, its mass
        is spread evenly over the old classes that are kept.
        """
        new = self.new[index]
        kept = new >= 0
        # Summed as probabilities, none of which is negative; weights would cancel out.
        prob = np.where(kept, weight + floor[:, None], 0).clip(min=0)
        # Old classes that are kept and not among the entries have the floor alone.
        mass = prob.sum(axis=1) + floor * (self._members.sum() - kept.sum(axis=1))
        nothing = mass <= 0
        # Rows without mass are overwritten below; 1 keeps the division quiet.
        safe = np.where(nothing, np.float32(1), mass).astype(np.float32)
        weight = np.where(kept & ~nothing[:, None], weight / safe[:, None], 0)
        base = np.where(nothing, np.float32(1 / self._members.sum()), floor / safe)
        uneven = np.broadcast_to(self._uneven, (len(index), len(self._uneven)))
        # Negative where fewer than the most common number of old classes become this one.
        excess = (self._members[self._uneven] - self._common).astype(np.float32)
        return (
            # A dropped class becomes an entry of class 0 with weight 0.
            np.concatenate([np.maximum(new, 0), uneven], axis=1),
            np.concatenate([weight, base[:, None] * excess], axis=1).astype(np.float32, copy=False),
            (base * self._common).astype(np.float32, copy=False),
        )

    def columns(
        self, class_index: npt.NDArray[Any], class_prob: npt.NDArray[np.float16]
    ) -> tuple[Ints, npt.NDArray[np.float16]]:
        """Return stored columns (..., k) in terms of the new classes: index and probability, (..., min(k, D)).

        A class has the sum of what its old classes had, not rescaled: what went to dropped classes is missing. Classes
        are distinct and in descending order; columns left over hold classes of probability 0.
        """
        shape, kept = class_index.shape, min(class_index.shape[-1], self.num_classes)
        new = self.new[class_index.reshape(-1, shape[-1])]
        prob = class_prob.reshape(new.shape).astype(np.float32)
        # (rows, k, k): whether two columns became the same new class. k is small, so comparing all is cheapest.
        same = (new[:, :, None] == new[:, None, :]) & (new >= 0)[:, None, :]
        mass = np.where(same, prob[:, None, :], 0).sum(axis=2)
        # A class's sum stays at its first column; later ones, and dropped classes, sort behind everything as -1.
        repeated = np.tril(same, -1).any(axis=2) | (new < 0)
        mass = np.where(repeated, -1, mass)
        order = np.argsort(-mass, axis=1, kind="stable")[:, :kept]
        mass, new = np.take_along_axis(mass, order, axis=1), np.take_along_axis(new, order, axis=1)
        new = _fill_up(new, mass >= 0)
        whole = (*shape[:-1], kept)
        return new.reshape(whole), mass.clip(min=0, max=1).astype(np.float16).reshape(whole)

    def target_prob(
        self,
        class_index: npt.NDArray[Any],
        class_prob: npt.NDArray[np.float16],
        target: npt.NDArray[np.integer[Any]],
        target_prob: npt.NDArray[np.float16],
    ) -> npt.NDArray[np.float16]:
        """Return the probability (R, N) of the new ground truth, from stored columns (R, N, k), (R,) and (R, N).

        It is the sum over the stored classes that become the new ground truth, and the old ground truth's own, which is
        stored apart, where it is not among them. NaN where the ground truth is unknown or dropped.
        """
        new_target = self.targets(target)[:, None]
        inside = np.where(self.new[class_index] == new_target[..., None], class_prob.astype(np.float32), 0).sum(axis=2)
        outside = (class_index != target[:, None, None]).all(axis=2)
        mapped = inside + np.where(outside, target_prob, np.float16(0))
        unknown = (new_target == UNKNOWN_TARGET) | np.isnan(target_prob)
        return np.where(unknown, np.nan, mapped.clip(max=1)).astype(np.float16)


def _fill_up(new: Ints, real: npt.NDArray[np.bool_]) -> Ints:
    """Put the smallest classes that a row does not have into the columns (B, k) that are not `real`."""
    short = np.flatnonzero(~real.all(axis=1))
    if not len(short):
        return new
    part, fine = np.where(real, new, DROPPED)[short], real[short]
    candidate = np.arange(new.shape[1])
    # Of the classes 0 .. K - 1, those a row does not have: at least as many as it has columns to fill.
    free = ~(part[:, :, None] == candidate[None, None]).any(axis=1)
    # False sorts before True, and stably: the free classes first, ascending.
    smallest = np.argsort(~free, axis=1, kind="stable")
    # The n-th column to fill takes the n-th free class.
    number = (~fine).cumsum(axis=1) - 1
    filled: Ints = new.copy()
    filled[short] = np.where(fine, part, np.take_along_axis(smallest, np.maximum(number, 0), axis=1))
    return filled


def map_columns(
    class_map: ClassMap, columns: Mapping[str, npt.NDArray[Any]], thresholds: Thresholds
) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of `ShardLabels` that a class map changes, in terms of the new classes.

    `columns` holds class_index, class_prob (R, N, k), target (R,), target_prob and bucket (R, N). Buckets are assigned
    anew, by what the teacher gave to the new classes, where classes are merged or dropped; `thresholds` are the
    label set's, as its manifest states them.
    """
    class_index, class_prob = columns["class_index"], columns["class_prob"]
    index, prob = class_map.columns(class_index, class_prob)
    target_prob = class_map.target_prob(class_index, class_prob, columns["target"], columns["target_prob"])
    bucket = columns["bucket"]
    if not class_map.is_renaming:
        # A crop of a dropped class is hard for the classes that are left (docs/decisions.md, record 28).
        bucket = buckets_of(prob, target_prob, thresholds)
    return {
        "class_index": index.astype(class_index_dtype(class_map.num_classes)),
        "class_prob": prob,
        "target": class_map.targets(columns["target"]).astype(np.int32),
        "target_prob": target_prob,
        "bucket": bucket,
    }


def make_class_map(
    classes: NewClasses,
    *,
    num_old: int,
    old_names: Sequence[str] | None,
    old_folders: Sequence[str] | None = None,
    num_classes: int | None = None,
    names: Sequence[str] | None = None,
) -> ClassMap:
    """Make a class map from what users write (see `LabelSet.map_classes`). Raises UsageError."""
    new, new_names = _new_classes(classes, num_old, _Names(old_names, num_old, old_folders))
    if names is not None:
        new_names = list(names)
    largest = int(new.max(initial=DROPPED)) + 1
    if num_classes is None:
        num_classes = max(largest, len(new_names or ()))
    if not largest <= num_classes <= MAX_NEW_CLASSES:
        raise UsageError(f"num_classes must be above {largest - 1}, which is a class of this map; got {num_classes}")
    if new_names is None and old_names is not None:
        new_names = _inherited(new, num_classes, old_names)
    if new_names is not None and names is None:
        new_names += [f"class {number}" for number in range(len(new_names), num_classes)]
    return ClassMap(new=new, num_classes=num_classes, names=None if new_names is None else tuple(new_names))


def class_numbers(
    classes: Any, *, num_classes: int, names: Sequence[str] | None, folders: Sequence[str] | None = None
) -> Ints:
    """Return the numbers of classes given by number, name, one of a name's synonyms, or class folder.

    Raises UsageError that lists some of the unknown ones.
    """
    if hasattr(classes, "tolist"):
        # NumPy arrays and tensors alike, as plain numbers.
        classes = classes.tolist()
    given = [classes] if isinstance(classes, (str, Integral)) else list(classes)
    return _Names(names, num_classes, folders).numbers(given)


class _Names:
    """Finds a class by its number, its name, a synonym in its name, or its class folder."""

    def __init__(self, names: Sequence[str] | None, num_classes: int, folders: Sequence[str] | None = None) -> None:
        self.names, self.num_classes, self._folders = names or (), num_classes, folders or ()

    @cached_property
    def _tables(self) -> tuple[dict[str, list[int]], ...]:
        # From what is meant most likely: the whole name, a synonym ("tench" of "tench, Tinca tinca"), the folder. Made
        # when the first word is looked up: classes are often numbers.
        return (
            _classes_by_word(enumerate(self.names)),
            _classes_by_word((n, word.strip()) for n, name in enumerate(self.names) for word in name.split(",")),
            _classes_by_word(enumerate(self._folders)),
        )

    def numbers(self, given: Sequence[Any]) -> Ints:
        """Return the classes' numbers. Raises UsageError that lists some of those that are unknown."""
        found = [self.number(one) for one in given]
        unknown = [one for one, number in zip(given, found, strict=True) if number is None]
        if unknown:
            shown = ", ".join(map(repr, unknown[:NAMES_SHOWN])) + (", ..." if len(unknown) > NAMES_SHOWN else "")
            raise UsageError(f"{len(unknown)} of {len(given)} classes are unknown: {shown}; {self._hint(unknown[0])}")
        return np.array(found, np.int64)

    def number(self, given: Any) -> int | None:
        """Return the class's number, None where there is none. Raises UsageError for a word of several classes."""
        if isinstance(given, str):
            found = self.called(given)
            if len(found) > 1:
                raise UsageError(f"{given!r} is the name of classes {', '.join(map(str, found))}; give their numbers")
            return found[0] if found else None
        # True and False are integers to Python; in a list of classes they are a mask given by mistake.
        number = int(given) if isinstance(given, Integral) and given is not True and given is not False else DROPPED
        return number if 0 <= number < self.num_classes else None

    def called(self, word: str) -> list[int]:
        """Return the classes that a word may mean."""
        return next((table[word] for table in self._tables if word in table), [])

    def _hint(self, unknown: Any) -> str:
        if not self.names:
            return f"the classes are numbered 0..{self.num_classes - 1} and have no names"
        known = f"classes are 0..{self.num_classes - 1}, with names such as {self.names[0]!r}"
        return nearest(unknown, list(self._tables[1]), known) if isinstance(unknown, str) else known


def _classes_by_word(words: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    classes: dict[str, list[int]] = {}
    for number, word in words:
        # A name may have a synonym twice.
        if number not in classes.setdefault(word, []):
            classes[word].append(number)
    return classes


def _new_classes(classes: NewClasses, num_old: int, old: _Names) -> tuple[Ints, list[str] | None]:
    """Return the new classes (C,), and their names where the map gives them."""
    if isinstance(classes, Mapping):
        keys = old.numbers(list(classes))
        if len(set(keys.tolist())) < len(keys):
            raise UsageError("this class map names an old class twice, such as by its number and by its name")
        numbers, new_names = _numbered(list(classes.values()))
        new = np.full(num_old, DROPPED, np.int64)
        new[keys] = numbers
        return new, new_names
    if isinstance(classes, str):
        raise UsageError(f"a class map is a dict, a list of new classes or a list of class names, got {classes!r}")
    given = classes.tolist() if hasattr(classes, "tolist") else list(classes)
    distinct_names = all(isinstance(one, str) for one in given) and len(set(given)) == len(given) > 0
    # Old classes to keep, not new names for all: as many as there are old classes may be either, and known names
    # decide.
    if distinct_names and (len(given) != num_old or all(old.called(name) for name in given)):
        kept = old.numbers(given)
        if len(set(kept.tolist())) < len(kept):
            raise UsageError("these names of classes to keep name one of them twice, such as by two of its synonyms")
        new = np.full(num_old, DROPPED, np.int64)
        new[kept] = np.arange(len(given))
        return new, given
    if distinct_names:
        _check_no_old_name_moves(given, old)
    if len(given) != num_old:
        raise UsageError(
            f"a class map that is a list has one new class (or None) for each of the {num_old} old ones, got "
            f"{len(given)}; a dict {{old: new}} may leave classes out"
        )
    return _numbered(given)


def _check_no_old_name_moves(given: Sequence[str], old: _Names) -> None:
    """Raise UsageError for new names of all old classes of which one is the name of another old class.

    They are likely the old classes in another order with one misspelt: taken as new names, every label would be wrong.
    """
    for number, name in enumerate(given):
        known = old.called(name)
        if known and number not in known:
            unknown = next(name for name in given if not old.called(name))
            raise UsageError(
                f"these {len(given)} names may be the old classes in another order, but {unknown!r} is none of them, "
                f"or new names of all, but {name!r} is the name of another old class than number {number}; give a "
                "dict {old: new}"
            )


def _numbered(values: list[Any]) -> tuple[Ints, list[str] | None]:
    """Number the new classes; names are numbered in the order in which they first come."""
    if any(isinstance(value, str) for value in values):
        names = list(dict.fromkeys(value for value in values if value is not None))
        if not all(isinstance(name, str) for name in names):
            raise UsageError("a class map's new classes are all numbers or all names")
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([DROPPED if value is None else numbers[value] for value in values], np.int64), names
    for value in values:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (whole and DROPPED <= value < MAX_NEW_CLASSES):
            raise UsageError(f"a new class is a number from 0, a name, or None where it is dropped; got {value!r}")
    return np.array([DROPPED if value is None else value for value in values], np.int64), None


def _inherited(new: Ints, num_classes: int, old_names: Sequence[str]) -> list[str]:
    """Name new classes after the old ones that they are made of."""
    members: list[list[str]] = [[] for _ in range(num_classes)]
    for old, number in enumerate(new.tolist()):
        if number >= 0:
            members[number].append(old_names[old])
    return [" / ".join(part) if part else f"class {number}" for number, part in enumerate(members)]
