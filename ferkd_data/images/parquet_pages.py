"""Read a single value of a column of bytes from its page in a Parquet file.

PyArrow reads a row group from its first row on, so one image costs all images before it in its group. This module
keeps a table of pages instead, and reads only the page that holds the row. Of a page that is not compressed, which is
how the library datasets writes images, it reads only the bytes of the one value.

Supported is what writers of images use: no lists, data pages of version 1 and 2, plain values. Anything else (values
in a dictionary, other encodings, nulls) raises `NotPlain`, and the caller reads the row with PyArrow.

Pages, definition levels and their run-length encoding follow the Parquet format specification.
"""

from __future__ import annotations

import bisect
import itertools
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ferkd_data.parquet_guard import (
    PAGE_COMPRESSED,
    PAGE_UNCOMPRESSED,
    USUAL_HEADER_BYTES,
    read_page_header,
    read_varint,
)
from ferkd_data.storage import open_regular_stream

MAX_PAGE_BYTES = 64 * 2**20
"""Larger pages are left to PyArrow."""
MAX_PAGES = 100_000
"""Largest number of pages in a row group."""
SMALL_VALUE_BYTES = 16 * 2**10
"""Mean size of values below which reading their whole page costs less than one call for each length."""
LENGTH_BYTES = 4
"""Size of the length before each value and before the definition levels of version 1, little-endian."""
CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli"}
"""PyArrow's names of Parquet's codecs. LZ4 is missing: Parquet has two codecs of this name."""

DATA, DICTIONARY, DATA_V2 = 0, 2, 3
PLAIN = 0
TYPE, HEADER_V1, HEADER_V2 = 1, 5, 8
NUM_VALUES, V1_ENCODING, V2_ENCODING, V2_LEVELS, V2_LISTS, V2_IS_COMPRESSED = 1, 2, 4, 5, 6, 7
"""Numbers in Parquet's Thrift definition of PageHeader, DataPageHeader and DataPageHeaderV2."""


class NotPlain(Exception):
    """Raised for a value that is stored in a way that only PyArrow reads."""


@dataclass(frozen=True, slots=True)
class _Page:
    """A data page with plain values."""

    start: int
    """Offset in the file of the first byte behind the header."""
    size: int
    """Bytes in the file."""
    uncompressed: int
    """Bytes after decompression."""
    values: int
    """Number of values."""
    level_bytes: int | None
    """Size of the definition levels, which lie uncompressed before the values; None in version 1, where the page itself
    begins with this size."""
    compressed: bool


@dataclass(frozen=True, slots=True)
class _Group:
    """Page table of a row group."""

    first_rows: list[int]
    """First row of each page, counted from the start of the row group."""
    pages: list[_Page | None]
    """None for a page that PyArrow has to read."""


class PagedColumn:
    """A column of bytes in one file. Threads may share it: each read opens the file and closes it again."""

    def __init__(self, path: Path, file: pq.ParquetFile, column: str) -> None:
        """Read offsets from the footer. Raises NotPlain where the column is a list or not stored as bytes."""
        self._path = path
        metadata = file.metadata
        index = _leaf(metadata, column)
        leaf = metadata.schema.column(index)
        if leaf.max_repetition_level or leaf.physical_type != "BYTE_ARRAY":
            raise NotPlain
        self._max_level = leaf.max_definition_level
        # Only numbers are kept: the caller closes `file`, and its metadata would hold every column of every group.
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(group.num_rows for group in groups))
        chunks = [group.column(index) for group in groups]
        # A dictionary page comes first where there is one.
        self._starts = [min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset) for c in chunks]
        self._stops = [a + c.total_compressed_size for a, c in zip(self._starts, chunks, strict=True)]
        self._codecs = [c.compression for c in chunks]
        self._groups: dict[int, _Group] = {}
        """Page tables by row group, made on demand. No lock: two threads that make the same one at once make equals."""
        self._last = threading.local()
        """The page that each thread has decompressed last; the next row is often in it."""
        self._stamp = _stamp(path.stat())

    def read(self, row: int) -> bytes:
        """Return the value of a row. Raises NotPlain, also where the file has changed, and OSError."""
        number = bisect.bisect_right(self._ends, row)
        if row < 0 or number == len(self._ends):
            raise NotPlain
        with open_regular_stream(self._path) as stream:
            descriptor = stream.fileno()
            # The offsets hold for this file only; PyArrow finds out what became of another one.
            if _stamp(os.fstat(descriptor)) != self._stamp:
                raise NotPlain
            group = self._groups.get(number)
            if group is None:
                group = self._groups[number] = self._walk(descriptor, number)
            row -= self._ends[number - 1] if number else 0
            # The last page that begins at this row or before it. Pages without rows share their first row with the
            # next.
            index = bisect.bisect_right(group.first_rows, row) - 1
            page = group.pages[index]
            if page is None:
                raise NotPlain
            return self._value(descriptor, number, page, row - group.first_rows[index])

    def _walk(self, descriptor: int, number: int) -> _Group:
        """Make the page table of a row group from the pages' headers."""
        at, stop, rows = self._starts[number], self._stops[number], 0
        first_rows: list[int] = []
        pages: list[_Page | None] = []
        while at < stop:
            header, size = _page_header(descriptor, at, stop)
            kind, body = header.get(TYPE), header.get(PAGE_COMPRESSED, -1)
            if body < 0 or at + size + body > stop or len(pages) == MAX_PAGES:
                raise NotPlain
            if kind in (DATA, DATA_V2):
                first_rows.append(rows)
                page = _page(header, at + size, self._codecs[number] != "UNCOMPRESSED")
                pages.append(page)
                rows += _values(header)
            at += size + body
        # Headers and footer disagree: then no row can be placed.
        if rows != self._ends[number] - (self._ends[number - 1] if number else 0):
            raise NotPlain
        return _Group(first_rows, pages)

    def _value(self, descriptor: int, number: int, page: _Page, index: int) -> bytes:
        """Read value `index` of a page. Plain values lie one after the other, so the lengths before it are followed."""
        if page.compressed or page.size < SMALL_VALUE_BYTES * page.values:
            values, at = self._unpacked(descriptor, number, page, index)
            for _ in range(index):
                at += LENGTH_BYTES + _length(values[at : at + LENGTH_BYTES])
            length = _length(values[at : at + LENGTH_BYTES])
            found = bytes(values[at + LENGTH_BYTES : at + LENGTH_BYTES + length])
        else:
            at, stop = page.start, page.start + page.size
            at += self._skip_levels(_exactly(descriptor, min(page.size, USUAL_HEADER_BYTES), at), page, index)
            for _ in range(index):
                at += LENGTH_BYTES + _length(_exactly(descriptor, LENGTH_BYTES, at))
                if at >= stop:
                    raise NotPlain
            length = _length(_exactly(descriptor, LENGTH_BYTES, at))
            if at + LENGTH_BYTES + length > stop:
                raise NotPlain
            found = _exactly(descriptor, length, at + LENGTH_BYTES)
        if len(found) != length:
            raise NotPlain
        return found

    def _unpacked(self, descriptor: int, number: int, page: _Page, index: int) -> tuple[memoryview, int]:
        """Return a decompressed page, and the offset at which its values begin."""
        kept = getattr(self._last, "page", None)
        # A page's offset names it: all pages are of this one, unchanged file.
        if kept is None or kept[0] != page.start:
            body = _exactly(descriptor, page.size, page.start)
            ahead = page.level_bytes or 0
            if page.compressed:
                try:
                    rest = pa.decompress(
                        body[ahead:], page.uncompressed - ahead, codec=CODECS[self._codecs[number]], asbytes=True
                    )
                except (pa.ArrowException, KeyError, OSError) as error:
                    raise NotPlain from error
                body = body[:ahead] + rest
            kept = self._last.page = (page.start, body)
        body = kept[1]
        return memoryview(body), self._skip_levels(body, page, index)

    def _skip_levels(self, data: bytes, page: _Page, index: int) -> int:
        """Return the offset at which the values begin. Raises NotPlain where a value up to `index` is null.

        A null has a smaller definition level and is not stored, so value i is the i-th stored one only before a null.
        """
        if not self._max_level:
            return page.level_bytes or 0
        ahead = page.level_bytes
        begin = 0
        if ahead is None:
            begin, ahead = LENGTH_BYTES, _length(data[:LENGTH_BYTES])
        if begin + ahead > len(data):
            raise NotPlain
        # Levels have as many bits as the largest needs: one for a column that may be null, two for one in a struct.
        levels = _levels(data[begin : begin + ahead], self._max_level.bit_length(), index + 1)
        if (levels != self._max_level).any():
            raise NotPlain
        return begin + ahead


def _leaf(metadata: pq.FileMetaData, column: str) -> int:
    """Find the leaf column that holds the bytes: the column itself, or its field `bytes`."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    found = [i for i, path in enumerate(paths) if path in (column, f"{column}.bytes")]
    if len(found) != 1:
        raise NotPlain
    return found[0]


def _page(header: dict[int, Any], start: int, compressed: bool) -> _Page | None:
    size, uncompressed = header[PAGE_COMPRESSED], header.get(PAGE_UNCOMPRESSED, -1)
    if not 0 <= uncompressed <= MAX_PAGE_BYTES or size > MAX_PAGE_BYTES:
        return None
    level_bytes = None
    if header[TYPE] == DATA_V2:
        about = header.get(HEADER_V2, {})
        encoding, level_bytes = about.get(V2_ENCODING), about.get(V2_LEVELS)
        compressed = compressed and about.get(V2_IS_COMPRESSED, True)
        if about.get(V2_LISTS) or level_bytes is None or not 0 <= level_bytes <= min(size, uncompressed):
            return None
    else:
        encoding = header.get(HEADER_V1, {}).get(V1_ENCODING)
    if encoding != PLAIN:
        return None
    return _Page(start, size, uncompressed, _values(header), level_bytes, compressed)


def _values(header: dict[int, Any]) -> int:
    about = header.get(HEADER_V2 if header[TYPE] == DATA_V2 else HEADER_V1, {})
    values = about.get(NUM_VALUES, -1)
    if values < 0:
        raise NotPlain
    return int(values)


def _page_header(descriptor: int, at: int, stop: int) -> tuple[dict[int, Any], int]:
    try:
        return read_page_header(lambda size: os.pread(descriptor, min(size, stop - at), at))
    except ValueError as error:
        raise NotPlain from error


def _levels(data: bytes, width: int, count: int) -> npt.NDArray[np.int64]:
    """Decode the first `count` definition levels, in Parquet's hybrid of runs and bit packing.

    The lowest bit of each head tells them apart: 1 for groups of 8 packed levels, 0 for a run of one level.
    """
    found: list[npt.NDArray[np.int64]] = []
    at = have = 0
    while have < count:
        try:
            head, at = read_varint(data, at)
        except ValueError as error:
            raise NotPlain from error
        size = (head >> 1) * width if head & 1 else (width + 7) // 8
        if at + size > len(data):
            raise NotPlain
        if head & 1:
            bits = np.unpackbits(np.frombuffer(data[at : at + size], np.uint8), bitorder="little")
            found.append(bits.reshape(-1, width).astype(np.int64) @ (1 << np.arange(width)))
        else:
            # A hostile run may claim billions of values: no more than are needed are made.
            run = min(head >> 1, count - have)
            found.append(np.full(run, int.from_bytes(data[at : at + size], "little"), np.int64))
        if not len(found[-1]):
            raise NotPlain
        at += size
        have += len(found[-1])
    return np.concatenate(found)[:count]


def _length(data: bytes | memoryview) -> int:
    if len(data) != LENGTH_BYTES:
        raise NotPlain
    return int.from_bytes(data, "little")


def _exactly(descriptor: int, size: int, at: int) -> bytes:
    """Read `size` bytes at offset `at`. Raises NotPlain where the file ends before."""
    # A read may return less than was asked for, on a network file system or after a signal.
    found = os.pread(descriptor, size, at)
    while 0 < len(found) < size:
        more = os.pread(descriptor, size - len(found), at + len(found))
        if not more:
            break
        found += more
    if len(found) != size:
        raise NotPlain
    return found


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
