"""Rows on disk in numbered piles, for joins and sorts of any length in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ferkd_data.images.duplicates import scratch_full

PILE_ROWS = 2**16
"""Rows that a pile should have, since it is taken as a whole; and that are written together, a piece to each pile."""
# Threads of Arrow's would each hold on to memory of their own.
WRITE = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
READ = pa.ipc.IpcReadOptions(use_threads=False)

Numbers = npt.NDArray[np.int64]


class Piles:
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
