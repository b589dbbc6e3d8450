"""Read the bytes of single rows of Parquet files: from their pages where possible, else with PyArrow.

`parquet_pages` reads one value without its neighbours, but only where it is stored plainly. PyArrow reads any file,
from the start of a row group on; a `RowCursor` goes on from there, so that rows in order are decoded once.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ferkd_data.errors import ImageError
from ferkd_data.images.parquet_columns import open_table
from ferkd_data.images.parquet_pages import NotPlain, PagedColumn
from ferkd_data.images.refs import ImageRef
from ferkd_data.images.retrying import retried, unreadable

BATCH_ROWS = 32
"""Rows that PyArrow decodes at a time: bounds the cost of a large row group."""
KEPT_FILES = 8
"""Files that a thread keeps open for reading single images."""
KEPT_BYTES = 4 * 2**20
"""Images that a cursor keeps in memory, unless one batch alone is larger."""


class ImageRowReader:
    """Read the images of one column in the files below a folder. Threads may share it; it can be pickled."""

    def __init__(self, root: Path, column: str) -> None:
        self._root = root
        self._column = column
        self._open_files = _OpenFiles()
        self._pages = _PageTables()

    def read(self, refs: Iterable[ImageRef]) -> Iterator[bytes | ImageError]:
        """Yield the bytes of `refs` in order, with an ImageError in place of an image that cannot be read."""
        cursor: RowCursor | None = None
        for ref in refs:
            if cursor is not None and not cursor.can_reach(ref):
                cursor = None
            content, cursor = self._read_row(ref, cursor)
            yield content

    def _read_row(self, ref: ImageRef, cursor: RowCursor | None) -> tuple[bytes | ImageError, RowCursor | None]:
        """Read a row; return it with the cursor to go on with, None after a failure.

        A cursor is taken out of `cursor` before it is used and comes back only after a success: one that has failed may
        be anywhere in its file, so each further attempt opens a new one.
        """

        def action() -> tuple[bytes | ImageError, RowCursor]:
            nonlocal cursor
            mine, cursor = cursor or RowCursor(self._root, ref.file, ref.offset, self._column), None
            return mine.advance_to(ref.offset), mine

        try:
            return retried(action, f"{ref.file}, row {ref.offset}")
        except OSError as error:
            return unreadable(f"{ref.file}, row {ref.offset}", error), None

    def read_one(self, ref: ImageRef) -> bytes:
        """Read the bytes of one image. Raises ImageError."""
        # The cheap way first: without it, one image costs all before it in its row group.
        paged = self._pages.column(self._root, ref.file, self._column)
        if paged is not None:
            try:
                return retried(lambda: paged.read(ref.offset), f"{ref.file}, row {ref.offset}")
            except NotPlain:
                pass  # stored in a way that only PyArrow reads
            except OSError as error:
                raise unreadable(f"{ref.file}, row {ref.offset}", error) from error
        kept = self._open_files.cursors
        # The list belongs to this thread. The cursor in use is taken out, so that a failed one is not found again.
        position = next((i for i, cursor in enumerate(kept) if cursor.can_reach(ref)), None)
        cursor = None if position is None else kept.pop(position)
        data, cursor = self._read_row(ref, cursor)
        if cursor is not None:
            # The one used last stands last; the one not used for longest is dropped, which closes its file.
            kept.append(cursor)
            del kept[:-KEPT_FILES]
        if isinstance(data, ImageError):
            raise data
        return data


class _OpenFiles(threading.local):
    """Cursors that each thread keeps open for itself. A pickled copy starts without any."""

    def __init__(self) -> None:
        self.cursors: list[RowCursor] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return (_OpenFiles, ())


class _PageTables:
    """Page table of each file, made when the file is first read. A pickled copy starts without any.

    All threads share it without a lock: two of them may make the same table at once, the tables are equal, and the one
    stored last stays.
    """

    def __init__(self) -> None:
        self._columns: dict[str, PagedColumn | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_PageTables, ())

    def column(self, root: Path, file: str, column: str) -> PagedColumn | None:
        """Return the page table of a file, None where PyArrow has to read it. Raises SourceError."""
        if file not in self._columns:
            try:
                with open_table(root / file) as opened:
                    self._columns[file] = PagedColumn(root / file, opened, column)
            except NotPlain:
                self._columns[file] = None
        return self._columns[file]


class RowCursor:
    """Read rows of one file with PyArrow. Belongs to one thread at a time.

    Batches of the current row group are kept up to KEPT_BYTES. A row in one of them costs nothing, a later row the
    batches up to it, a row in a batch that was dropped its row group again.
    """

    def __init__(self, root: Path, file: str, row: int, column: str) -> None:
        self.file = file
        self._column = column
        self._opened = open_table(root / file)
        metadata = self._opened.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(sizes))
        self._group = -1
        self._read: list[tuple[int, pa.RecordBatch]] = []
        """Batches of the current row group in order, each with the number of its first row."""
        self._rest: Iterator[pa.RecordBatch] = iter(())

    def can_reach(self, ref: ImageRef) -> bool:
        """Return whether `ref` is in the file of this cursor."""
        return self.file == ref.file

    def advance_to(self, row: int) -> bytes | ImageError:
        """Return the value of a row. Raises OSError."""
        group = bisect.bisect_right(self._ends, row)
        if group == len(self._ends):
            return ImageError("unreadable", f"{self.file} has no row {row}; did it change?")
        try:
            batch, index = self._find(group, row)
        except StopIteration:
            return ImageError("unreadable", f"{self.file} has no row {row}; did it change?")
        except pa.ArrowException as error:
            # PyArrow's iterator cannot be continued after an error: the group is read from its start next time.
            self._group = -1
            return ImageError("unreadable", f"{self.file}, row {row}: {error}")
        return _bytes_of(batch.column(self._column)[index].as_py(), f"{self.file}, row {row}")

    def _find(self, group: int, row: int) -> tuple[pa.RecordBatch, int]:
        if group != self._group:
            self._group, self._read = group, []
            self._rest = self._opened.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=[self._column], use_threads=False
            )
        start = self._ends[group - 1] if group else 0
        while not self._read or row >= self._read[-1][0] + self._read[-1][1].num_rows:
            first = self._read[-1][0] + self._read[-1][1].num_rows if self._read else start
            self._read.append((first, next(self._rest)))
            self._drop_batches()
        for first, batch in self._read:
            if first <= row < first + batch.num_rows:
                return batch, row - first
        # `_drop_batches` has dropped its batch: read the row group again.
        self._group = -1
        return self._find(group, row)

    def _drop_batches(self) -> None:
        while len(self._read) > 1 and sum(batch.nbytes for _, batch in self._read) > KEPT_BYTES:
            del self._read[0]


def _bytes_of(image: Any, where: str) -> bytes | ImageError:
    data = image.get("bytes") if isinstance(image, dict) else image
    if data is not None:
        return bytes(data)
    path = image.get("path") if isinstance(image, dict) else None
    what = f"only a path ({path}), no image bytes" if path else "no image bytes"
    return ImageError("missing_image", f"{where} holds {what}")
