"""Check what a Parquet file's footer and page headers claim, before Arrow trusts them.

Arrow allocates memory for each page as its header says, whatever the footer's totals are: a file of 12 kB made it
allocate 800 MB. Some footers abort the whole process when PyArrow is asked about a column (found by fuzzing), and so do
schemas nested thousands of levels deep with PyArrow before 23. This module reads footer and headers first. Its time is
bounded by the file's size, although pages may be tiny and many chunks may claim the same pages.

Footers and headers are in Thrift's compact protocol; numbers, bytes, lists and structs of it are supported. A byte may
become 100 in memory, so callers pass no more bytes than they can afford.
"""

from __future__ import annotations

import mmap
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ferkd_data.storage import open_regular_stream

TRUE, FALSE, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 12
MAX_DEPTH = 16
"""Structs and lists within each other. Parquet needs 8 levels; without a limit, a hostile file ends in a
RecursionError."""
DOUBLE_BYTES = 8
LONG_LIST = 15
"""Length in a list's head that means that the real length follows as a number."""


def read_struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Read the struct at offset `at`; return its fields by number, and the offset behind it. Raises ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError("structs nested too deep")
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head, at = _byte(data, at)
        # A struct ends with a field of kind 0.
        if head == 0:
            return fields, at
        # The upper half of a head is the distance from the last field's number; 0 means that the number follows.
        if head >> 4:
            number += head >> 4
        else:
            number, at = _zigzag(data, at)
        kind = head & 15
        # As a field a boolean has no byte: its kind is its value. In a list each has one (see `_value`).
        if kind in (TRUE, FALSE):
            fields[number] = kind == TRUE
        else:
            fields[number], at = _value(data, at, kind, depth)


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in INTEGERS:
        return _zigzag(data, at)
    if kind in (TRUE, FALSE, BYTE):
        return _byte(data, at)
    if kind == STRUCT:
        return read_struct(data, at, depth + 1)
    if kind == BINARY:
        size, at = read_varint(data, at)
        return _bytes(data, at, size)
    if kind == DOUBLE:
        return _bytes(data, at, DOUBLE_BYTES)
    if kind in LISTS:
        return _list(data, at, depth + 1)
    raise ValueError(f"a field of kind {kind}")


def _list(data: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    if depth > MAX_DEPTH:
        raise ValueError("lists nested too deep")
    head, at = _byte(data, at)
    count = head >> 4
    if count == LONG_LIST:
        count, at = read_varint(data, at)
    # A hostile count ends soon: every item takes at least one byte, and reading beyond the data raises.
    items = []
    for _ in range(count):
        item, at = _value(data, at, head & 15, depth)
        items.append(item)
    return items, at


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    """Read a signed number: Thrift stores 0, -1, 1, -2, … as 0, 1, 2, 3, …"""
    value, at = read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Read an unsigned number of 7 bits per byte, lowest first; the top bit says that more follow."""
    value = 0
    # Ten bytes of 7 bits are enough for 64, the longest number in Thrift.
    for shift in range(0, 70, 7):
        byte, at = _byte(data, at)
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without end")


def _bytes(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    if size > len(data) - at:
        raise ValueError(f"{size} bytes where {len(data) - at} are")
    return data[at : at + size], at + size


def _byte(data: bytes, at: int) -> tuple[int, int]:
    if not 0 <= at < len(data):
        raise ValueError("the data ends too early")
    return data[at], at + 1


MAGIC = b"PAR1"
TAIL_BYTES = 8
MAX_FOOTER_BYTES, MAX_PAGE_HEADER_BYTES = 2**20, 2**16
"""Limits for label sets. A block file of a build has a footer of 5 kB, and page headers below 3 kB."""
SOURCE_FOOTER_BYTES, BYTES_PER_FOOTER_BYTE = 2**23, 256
"""Limit for tables of images: a footer may have the first number of bytes, plus one for each 256 bytes of the file.
20,000 class names take 2 MB."""
FREE_PARTS, BYTES_PER_PART = 1000, 1024
"""Limit on pages and column chunks together: the first number, plus one for each 1,024 bytes of the file. The pages of
a build have up to 1 MB."""
MAX_SCHEMA_DEPTH, MAX_SCHEMA_FIELDS = 16, 1000
"""Limits for label sets, whose schema is nested 3 levels deep and has 35 fields."""
MAX_SOURCE_DEPTH, MAX_SOURCE_FIELDS = 64, 10_000
"""Limits for tables of images. Arrow 16 to 22 aborts the process at some thousands of levels."""
SCHEMA, NUM_ROWS, ROW_GROUPS = 2, 3, 4
NUM_CHILDREN = 5
USUAL_HEADER_BYTES = 512
"""Bytes copied for a page header at first; a header with long statistics is read again with more."""
GROUP_COLUMNS, GROUP_ROWS = 1, 3
CHUNK_METADATA = 3
PATH, NUM_VALUES, UNCOMPRESSED, COMPRESSED, DATA_PAGE, DICTIONARY_PAGE = 3, 5, 6, 7, 9, 11
PAGE_UNCOMPRESSED, PAGE_COMPRESSED = 2, 3
"""Field numbers in Parquet's Thrift definition."""


def read_page_header(head: Callable[[int], bytes]) -> tuple[dict[int, Any], int]:
    """Read the header of a page, and return its size too. `head(n)` gives the first n bytes. Raises ValueError."""
    try:
        return read_struct(head(USUAL_HEADER_BYTES), 0)
    except ValueError:
        return read_struct(head(MAX_PAGE_HEADER_BYTES), 0)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Claims about one column of one row group."""

    column: str
    rows: int
    values: int
    bytes: int
    """Size in memory: the footer's claim, or the sum of the page headers' claims where that is larger."""


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Claims about a file."""

    rows: int
    row_groups: int
    chunks: tuple[Chunk, ...]


def read_claims(path: Path, columns: list[str]) -> Claims:
    """Read a file's claims about `columns`. Raises ValueError for an impossible footer or page header."""
    with _mapped(path) as data, _complete():
        footer = _footer(data, MAX_FOOTER_BYTES)
        groups = footer[ROW_GROUPS]
        _check_schema(footer[SCHEMA], MAX_SCHEMA_DEPTH, MAX_SCHEMA_FIELDS)
        walk = _Walk(data)
        chunks = tuple(chunk for group in groups for chunk in walk.chunks(group, columns))
        return Claims(rows=footer[NUM_ROWS], row_groups=len(groups), chunks=chunks)


def check_footer(path: Path) -> None:
    """Refuse a footer that Arrow must not see, in a table of images that anybody may have written.

    The schema may be nested moderately, and column chunks must lie within the file without overlapping. Raises
    ValueError, and as `open_regular` does LabelSetError and OSError.
    """
    with _mapped(path) as data, _complete():
        footer = _footer(data, SOURCE_FOOTER_BYTES + len(data) // BYTES_PER_FOOTER_BYTE)
        _check_schema(footer[SCHEMA], MAX_SOURCE_DEPTH, MAX_SOURCE_FIELDS)
        walk = _Walk(data)
        for group in footer[ROW_GROUPS]:
            walk.check_locations(group)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with (
        open_regular_stream(path) as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        yield data


@contextmanager
def _complete() -> Iterator[None]:
    """Turn the errors that a missing or mistyped field of a footer causes into ValueError."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"its footer lacks what every footer has ({error})") from error


def _footer(data: mmap.mmap, max_bytes: int) -> dict[int, Any]:
    size = int.from_bytes(data[-TAIL_BYTES:-4], "little")
    if data[-4:] != MAGIC or not 0 < size <= min(max_bytes, len(data) - TAIL_BYTES):
        raise ValueError(f"a footer of {size} bytes in {len(data)}")
    footer, _ = read_struct(data[-TAIL_BYTES - size : -TAIL_BYTES], 0)
    if not isinstance(footer.get(NUM_ROWS), int) or not isinstance(footer.get(ROW_GROUPS), list):
        raise ValueError("its footer has no rows or row groups")
    return footer


def _check_schema(fields: list[dict[int, Any]], max_depth: int, max_fields: int) -> None:
    """Raise ValueError for a schema that is nested too deep or has too many fields."""
    if len(fields) > max_fields:
        raise ValueError(f"a schema of {len(fields)} fields")
    # Parquet lists the tree depth first: this stack counts the children that each open level still lacks.
    open_children: list[int] = []
    for field in fields:
        while open_children and open_children[-1] == 0:
            open_children.pop()
        if open_children:
            open_children[-1] -= 1
        children = operator.index(field.get(NUM_CHILDREN) or 0)
        if children:
            open_children.append(children)
        if len(open_children) > max_depth:
            raise ValueError(f"a schema nested more than {max_depth} levels deep")


class _Walk:
    """Walk over the pages of a file. Raises ValueError where there are more than its size allows."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._parts_left = FREE_PARTS + len(data) // BYTES_PER_PART
        self._bytes_left = len(data)
        """Bytes of the file that are in no chunk yet; each byte may be in one chunk only."""

    def chunks(self, group: dict[int, Any], columns: list[str]) -> Iterator[Chunk]:
        for column in group[GROUP_COLUMNS]:
            # Columns that nobody asked for are counted too: a hostile footer may list millions of them.
            self._count()
            metadata = column[CHUNK_METADATA]
            name = metadata[PATH][0].decode("utf-8", "replace")
            if name in columns:
                size = max(metadata[UNCOMPRESSED], self._page_bytes(metadata))
                rows, values = operator.index(group[GROUP_ROWS]), operator.index(metadata[NUM_VALUES])
                yield Chunk(column=name, rows=rows, values=values, bytes=operator.index(size))

    def check_locations(self, group: dict[int, Any]) -> None:
        """Raise ValueError for chunks of a row group that cannot lie where they claim to."""
        operator.index(group[GROUP_ROWS])
        for column in group[GROUP_COLUMNS]:
            self._count()
            metadata = column[CHUNK_METADATA]
            metadata[PATH][0].decode("utf-8", "replace")
            # Nothing is done with the number; `index` raises where a hostile footer has a text or a list in its place.
            operator.index(metadata[UNCOMPRESSED])
            self._location(metadata)

    def _location(self, metadata: dict[int, Any]) -> tuple[int, int]:
        """Return the offsets at which a chunk's pages begin and end; (0, 0) without values, when Arrow reads none."""
        if not metadata[NUM_VALUES]:
            return 0, 0
        # A dictionary comes before the pages that refer to it. Offset 0 stands for none: the file's magic number is
        # there.
        at = min(metadata[DATA_PAGE], metadata.get(DICTIONARY_PAGE) or metadata[DATA_PAGE])
        stop = at + metadata[COMPRESSED]
        if not 0 <= at <= stop <= len(self._data):
            raise ValueError(f"pages at {at}..{stop} of a file of {len(self._data)} bytes")
        # Together, chunks may claim as many bytes as the file has, which bounds the work.
        self._bytes_left -= stop - at
        if self._bytes_left < 0:
            raise ValueError("column chunks that overlap")
        return at, stop

    def _page_bytes(self, metadata: dict[int, Any]) -> int:
        at, stop = self._location(metadata)
        total = 0
        while at < stop:
            self._count()
            # `at` always grows, since a header has at least one byte and `compressed` is not negative: the walk ends.
            header, size = read_page_header(partial(self._bytes, at))
            uncompressed, compressed = header[PAGE_UNCOMPRESSED], header[PAGE_COMPRESSED]
            if uncompressed < 0 or compressed < 0:
                raise ValueError(f"a page of {compressed} bytes that become {uncompressed}")
            total += uncompressed
            at += size + compressed
        return total

    def _bytes(self, at: int, size: int) -> bytes:
        return self._data[at : at + size]

    def _count(self) -> None:
        self._parts_left -= 1
        if self._parts_left < 0:
            raise ValueError(f"more pages and column chunks than a file of {len(self._data)} bytes has")
