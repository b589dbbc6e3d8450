"""Rows that a selection keeps: pure functions of the label set and the criteria.

Rows are int64 numbers of the label set that is selected from, ascending. Only the keys or the targets of one shard
are in memory at a time, besides the row numbers and the set of keys or classes asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from numbers import Integral, Real
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.class_map import NAMES_SHOWN
from ferkd_data.errors import UsageError
from ferkd_data.format.manifest import ShardEntry
from ferkd_data.labels.rows import ShardLabels

Rows: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Where: TypeAlias = Callable[[ShardLabels], Any]


class Selectable(Protocol):
    """The parts of a label set that a selection reads."""

    first_row: Rows

    @property
    def location(self) -> str: ...

    @property
    def num_classes(self) -> int: ...

    def class_numbers(self, classes: Any) -> npt.NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def filled_shards(self) -> Iterator[ShardEntry]: ...

    def keys_of(self, shard: int) -> list[str]: ...

    def targets_of(self, shard: int) -> npt.NDArray[np.int32]: ...

    def shard(self, index: int) -> ShardLabels: ...

    def key_hashes(self) -> npt.NDArray[np.uint64]: ...


def chosen_rows(labels: Selectable, *, keys: Any, classes: Any, rows: Any, where: Where | None) -> Rows:
    """Return the rows that all given criteria keep. Raises UsageError as `LabelSet.select` does."""
    given = {"keys": keys, "classes": classes, "rows": rows, "where": where}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        raise UsageError("select needs at least one of keys=, classes=, rows= and where=")
    # A mask, one byte for each row, whatever the criteria keep.
    kept = np.ones(len(labels), np.bool_)
    # The cheap criteria first: each later one reads only the shards that still have rows.
    if "rows" in given:
        kept &= _row_mask(labels, rows)
    if "classes" in given:
        kept &= _class_mask(labels, classes, kept)
    if "keys" in given:
        kept &= _key_mask(labels, keys)
    if where is not None:
        kept &= _where_mask(labels, where, kept)
    if not kept.any():
        raise UsageError(
            f"{labels.location}: no image of {len(labels)} is selected by {' and '.join(f'{name}=' for name in given)}"
        )
    return np.flatnonzero(kept)


def rows_by_target(labels: Selectable, wanted: Callable[[npt.NDArray[np.int32]], Mask]) -> Rows:
    """Return the rows whose ground truths `wanted` keeps. Raises UsageError where there are none."""
    kept = _by_shard(labels, np.ones(len(labels), np.bool_), lambda shard: wanted(labels.targets_of(shard)))
    if not kept.any():
        raise UsageError(f"{labels.location}: no image of {len(labels)} is of a class that is kept")
    return np.flatnonzero(kept)


def split_rows(labels: Selectable, share: Any, seed: Any) -> tuple[Rows, Rows]:
    """Return the rows outside and inside a random `share` of the keys; a key's side depends on (seed, key) alone."""
    if not isinstance(share, Real) or not 0 < float(share) < 1:
        raise UsageError(f"the share of a split must be a number between 0 and 1, got {share!r}")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise UsageError(f"the seed of a split must be a whole number, got {seed!r}")
    # A key's side is a function of (seed, key) alone: images that come or go change no other image's side.
    words = rng.mix64(labels.key_hashes() ^ np.uint64(rng.hash64("split", int(seed))))
    inside = rng.uniforms(words) < float(share)
    if inside.all() or not inside.any():
        raise UsageError(
            f"{labels.location}: a split of {len(labels)} images by {share} leaves one side empty; "
            "take another share or another seed"
        )
    return np.flatnonzero(~inside), np.flatnonzero(inside)


def _row_mask(labels: Selectable, rows: Any) -> Mask:
    # One row given as a number, as `labels[3]` takes it.
    if isinstance(rows, Integral):
        rows = [rows]
    elif not hasattr(rows, "__len__") and not isinstance(rows, slice):
        rows = list(rows)
    # Python's own slicing rules, also for negative and open ends.
    numbers: npt.NDArray[Any] = np.arange(len(labels))[rows] if isinstance(rows, slice) else np.asarray(rows)
    if numbers.dtype == np.bool_:
        if numbers.shape != (len(labels),):
            raise UsageError(f"a mask of rows has one entry for each of {len(labels)} images, got {numbers.shape}")
        return np.asarray(numbers, np.bool_)
    # An empty list is float64 to NumPy: it gets the error for empty selections, not this one.
    if numbers.ndim != 1 or not (numbers.size == 0 or np.issubdtype(numbers.dtype, np.integer)):
        raise UsageError(f"rows must be row numbers, a slice or a mask, got {numbers.dtype} of shape {numbers.shape}")
    beyond = numbers[(numbers < 0) | (numbers >= len(labels))]
    if len(beyond):
        raise UsageError(f"{labels.location}: row {int(beyond[0])} of {len(labels)} does not exist")
    mask = np.zeros(len(labels), np.bool_)
    mask[numbers.astype(np.int64)] = True
    # A set bit for each number, unless one came twice.
    if int(mask.sum()) < len(numbers):
        raise UsageError("rows names a row twice; a selection holds each image once")
    return mask


def _key_mask(labels: Selectable, keys: Iterable[str]) -> Mask:
    # A string is an iterable of its letters, which nobody means here.
    wanted = {keys} if isinstance(keys, str) else set(keys)
    mask = np.zeros(len(labels), np.bool_)
    found: set[str] = set()
    for entry in labels.filled_shards():
        first = int(labels.first_row[entry.index])
        # Keys are compared themselves, not their hashes: a selection is exact.
        for row, key in enumerate(labels.keys_of(entry.index), first):
            if key in wanted:
                mask[row] = True
                found.add(key)
    unknown = wanted - found
    if unknown:
        shown = ", ".join(sorted(map(repr, unknown))[:NAMES_SHOWN]) + (", ..." if len(unknown) > NAMES_SHOWN else "")
        ours = labels.keys_of(next(labels.filled_shards()).index)[0]
        raise UsageError(
            f"{labels.location}: {len(unknown)} of {len(wanted)} keys are unknown: {shown}; keys look like {ours!r}"
        )
    return mask


def _class_mask(labels: Selectable, classes: Any, kept: Mask) -> Mask:
    wanted = np.zeros(labels.num_classes, np.bool_)
    wanted[labels.class_numbers(classes)] = True
    return _by_shard(labels, kept, lambda shard: in_classes(labels.targets_of(shard), wanted))


def in_classes(target: npt.NDArray[np.integer[Any]], wanted: Mask) -> Mask:
    """Return a mask of the ground truths that are among the wanted classes; unknown ones never are."""
    known = target >= 0
    return known & wanted[np.where(known, target, 0)]


def _where_mask(labels: Selectable, where: Where, kept: Mask) -> Mask:
    if not callable(where):
        raise UsageError(
            f"where must be a function of a shard's labels, such as lambda s: s.height > 100; got {where!r}"
        )

    def rows_of(shard: int) -> Mask:
        given = labels.shard(shard)
        mask = np.asarray(where(given))
        if mask.dtype != np.bool_ or mask.shape != (len(given),):
            raise UsageError(
                f"where must return one bool for each image: shape ({len(given)},) for shard {shard}; "
                f"got {mask.dtype} of shape {mask.shape}"
            )
        return mask

    return _by_shard(labels, kept, rows_of)


def _by_shard(labels: Selectable, kept: Mask, rows_of: Callable[[int], Mask]) -> Mask:
    """Join the masks of all shards; shards without rows in `kept` are not read."""
    mask = np.zeros(len(labels), np.bool_)
    for entry in labels.filled_shards():
        part = slice(int(labels.first_row[entry.index]), int(labels.first_row[entry.index + 1]))
        if kept[part].any():
            mask[part] = rows_of(entry.index)
    return mask
