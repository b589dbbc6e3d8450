"""Rows on disk in numbered piles, for joins and sorts of any length in bounded memory.

Where an extended label set's images lie in the source: a join by key on disk, with bounded memory.

Both sides go to piles by the hash of the key, and are joined pile by pile. What is to be labelled then goes to piles by
its place in the plan, each of which is sorted alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ferkd_data.builder.plan import SCHEMA as PLAN
from ferkd_data.builder.plan import table_of
from ferkd_data.images import ImageRef
from ferkd_data.images.keys import scratch_full
from ferkd_data.scratch import Scratch

PILE_ROWS = 2**16
"""Rows that a pile should have, since it is taken as a whole; and that are written together, a piece to each pile."""
# Threads of Arrow's would each hold on to memory of their own.
WRITE = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
READ = pa.ipc.IpcReadOptions(use_threads=False)

Numbers = npt.NDArray[np.int64]


class Partitions:
    """Within a pile, rows keep the order they came in."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder = folder
        self.schema = schema
        self._tables: list[pa.Table] = []
        self._numbers: list[Numbers] = []
        self._waiting = 0
        folder.mkdir()

    def add(self, rows: pa.Table, numbers: Numbers) -> None:
        """Each row goes to the pile of its number. Raises StorageFullError."""
        self._tables.append(rows)
        self._numbers.append(numbers)
        self._waiting += len(numbers)
        if self._waiting >= PILE_ROWS:
            self._write()

    def read(self, number: int) -> Iterator[pa.Table]:
        """The rows of a pile, about PILE_ROWS at a time; it is gone then."""
        self._write()
        path = self._path(number)
        if not path.exists():
            return
        pieces: list[pa.RecordBatch] = []
        with path.open("rb") as file:
            while file.peek(1):
                pieces += pa.ipc.open_stream(file, options=READ)
                if sum(map(len, pieces)) >= PILE_ROWS:
                    yield self._table(pieces)
        yield self._table(pieces)
        path.unlink()

    def take(self, number: int) -> pa.Table:
        """All rows of a pile; it is gone then."""
        tables = list(self.read(number)) or [self.schema.empty_table()]
        return pa.concat_tables(tables).combine_chunks()

    def _table(self, pieces: list[pa.RecordBatch]) -> pa.Table:
        """Empties the list: what is copied is not to be held twice."""
        table = pa.Table.from_batches(pieces, self.schema).combine_chunks()
        pieces.clear()
        return table

    def _write(self) -> None:
        if not self._waiting:
            return
        numbers = np.concatenate(self._numbers)
        order = np.argsort(numbers, kind="stable")
        rows = pa.concat_tables(self._tables).combine_chunks().take(order)
        self._tables, self._numbers, self._waiting = [], [], 0
        present, starts = np.unique(numbers[order], return_index=True)
        for number, start, stop in zip(present.tolist(), starts, [*starts[1:], len(order)], strict=True):
            self._append(self._path(number), rows.slice(start, stop - start))

    def _append(self, path: Path, rows: pa.Table) -> None:
        # Opened for each piece: a thousand million images make more piles than a process may have open files.
        try:
            with path.open("ab") as file, pa.ipc.new_stream(file, self.schema, options=WRITE) as stream:
                stream.write_table(rows)
        except OSError as error:
            raise scratch_full(self.folder.parent, error) from error

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.arrow"


KNOWN = pa.schema([*map(PLAN.field, ("key", "target", "image_digest")), ("row", pa.int64())])
REJECTED = pa.schema([("key", pa.string()), ("row", pa.int64())])
LISTED = PLAN.append(pa.field("place", pa.int64()))
NO_PLACE = -1
"""Of an image that the source names and rejects."""
NO_TARGET = -1


class Found(NamedTuple):
    place: int
    key: str
    saved: int | None = None
    """Its target in the label set."""
    now: int | None = None
    """Its target in the source."""


class KnownImages:
    """What a label set has, and where the source has it. A context; gone when it ends."""

    def __init__(self, num_known: int, num_rejected: int) -> None:
        self.num_known = num_known
        self.num_listed = self.num_found = 0
        self.max_target = -1
        self.mismatch: Found | None = None
        """The first image of the source that has another target there."""
        self.missing: Found | None = None
        """The first image of the label set that the source does not have."""
        self.is_gone = np.ones(num_rejected, np.bool_)
        """Which of the rejected images the source does not have any more."""
        self._num_piles = (num_known + num_rejected) // PILE_ROWS + 1

    def __enter__(self) -> KnownImages:
        self._folder = Scratch("keys")
        folder = self._folder.path
        self._known = Partitions(folder / "known", KNOWN)
        self._rejected = Partitions(folder / "rejected", REJECTED)
        self._listed = Partitions(folder / "listed", LISTED)
        self._placed = Partitions(folder / "placed", LISTED)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.remove()

    def add_labelled(self, first_row: int, keys: Sequence[str], targets: Any, digests: Any) -> None:
        """Images of the label set, with anything that Arrow makes columns of."""
        rows = [keys, targets, digests, _count(first_row, keys)]
        self._known.add(pa.table(rows, schema=KNOWN), self._piles(keys))

    def add_rejected(self, first_row: int, keys: Sequence[str]) -> None:
        self._rejected.add(pa.table([keys, _count(first_row, keys)], schema=REJECTED), self._piles(keys))

    def add_listed(self, refs: Sequence[ImageRef]) -> None:
        """The next images of the source."""
        self._list(refs, _count(self.num_known + self.num_listed, refs))
        self.num_listed += len(refs)

    def add_named(self, keys: Sequence[str]) -> None:
        """Images that the source rejects."""
        refs = [ImageRef(key=key, target=None, file="", offset=0, length=0) for key in keys]
        self._list(refs, np.full(len(refs), NO_PLACE))

    def join(self, *, place_known: bool) -> None:
        """Give each image of the source its place: the row that it has, or one after all of those.

        Those that the label set has get none without `place_known`.
        """
        for pile in range(self._num_piles):
            known, rejected = self._known.take(pile), self._rejected.take(pile)
            is_missing = np.ones(len(known), np.bool_)
            for listed in self._listed.read(pile):
                is_back = pc.is_in(_array(rejected, "key"), value_set=_array(listed, "key"))
                self.is_gone[_array(rejected, "row").filter(is_back).to_numpy()] = False
                listed = listed.filter(pc.not_equal(listed["place"], NO_PLACE))
                index = pc.index_in(_array(listed, "key"), value_set=_array(known, "key"))
                is_missing[index.drop_null().to_numpy()] = False
                self._place(listed, known.take(index), place_known=place_known)
            for first in np.flatnonzero(is_missing)[:1].tolist():
                found = Found(known["row"][first].as_py(), known["key"][first].as_py())
                self.missing = min(self.missing or found, found)

    def placed(self, sizes: Iterable[int]) -> Iterator[pa.Table]:
        """What is to be labelled, by its place, in tables of these sizes; short, then empty, when nothing is left."""
        rest = PLAN.empty_table()
        tables = self._in_order()
        for size in sizes:
            while len(rest) < size and (more := next(tables, None)) is not None:
                rest = pa.concat_tables([rest, more])
            yield rest.slice(0, size)
            rest = rest.slice(size)

    def _list(self, refs: Sequence[ImageRef], places: Numbers) -> None:
        rows = table_of(refs).append_column(LISTED.field("place"), pa.array(places))
        self._listed.add(rows, self._piles([ref.key for ref in refs]))

    def _place(self, listed: pa.Table, known: pa.Table, *, place_known: bool) -> None:
        """Row by row, `known` has what the label set says of `listed`, or nulls."""
        rows = _array(known, "row")
        is_new = rows.is_null().to_numpy(zero_copy_only=False)
        saved, now = _targets(known), _targets(listed)
        self._note_mismatch(listed, saved, now, ~is_new & (saved != now))
        self.num_found += int(np.count_nonzero(~is_new))
        self.max_target = max(self.max_target, int(now.max(initial=NO_TARGET)))
        columns = dict(zip(LISTED.names, listed.columns, strict=True))
        columns |= {"place": pc.coalesce(rows, _array(listed, "place")), "image_digest": known["image_digest"]}
        placed = pa.table(columns, schema=LISTED).filter(np.full(len(listed), True) if place_known else is_new)
        self._placed.add(placed, placed["place"].to_numpy() // PILE_ROWS)

    def _note_mismatch(self, listed: pa.Table, saved: Numbers, now: Numbers, differs: npt.NDArray[np.bool_]) -> None:
        for first in np.flatnonzero(differs)[:1].tolist():  # rows of a pile are in the order of the source
            targets = (None if at[first] == NO_TARGET else int(at[first]) for at in (saved, now))
            found = Found(listed["place"][first].as_py(), listed["key"][first].as_py(), *targets)
            self.mismatch = min(self.mismatch or found, found)

    def _in_order(self) -> Iterator[pa.Table]:
        for pile in range((self.num_known + self.num_listed) // PILE_ROWS + 1):
            rows = self._placed.take(pile)
            rows = rows.take(np.argsort(rows["place"].to_numpy()))
            yield pa.Table.from_arrays([rows[name] for name in PLAN.names], schema=PLAN)

    def _piles(self, keys: Sequence[str]) -> Numbers:
        # Python's own hash is another in each process; these piles do not outlive this one.
        return np.fromiter(map(hash, keys), np.int64, len(keys)) % self._num_piles


def _count(first: int, things: Sequence[Any]) -> Numbers:
    return np.arange(first, first + len(things))


def _array(table: pa.Table, name: str) -> pa.Array:
    return table.column(name).combine_chunks()


def _targets(table: pa.Table) -> Numbers:
    numbers: Numbers = _array(table, "target").fill_null(NO_TARGET).to_numpy()
    return numbers
