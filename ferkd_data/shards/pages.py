"""How much memory the pages of a Parquet file claim, before Arrow takes it.

Arrow believes each page's header, whatever the footer's totals say: a file of 12 kB made it take 800 MB. So the headers
are walked first. They are Thrift structs (compact protocol); only whole numbers are kept, all else is stepped over.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import pyarrow.parquet as pq

UNCOMPRESSED, COMPRESSED = 2, 3
"""Numbers of the page header's fields."""
TRUE, FALSE, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 12
MAX_DEPTH = 8
DOUBLE_BYTES = 8


def claimed_bytes(path: Path, chunks: list[pq.ColumnChunkMetaData]) -> list[int]:
    """Bytes of all pages of each column chunk, uncompressed. Raises ValueError for headers that cannot be."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return [_chunk_bytes(data, chunk) for chunk in chunks]


def _chunk_bytes(data: mmap.mmap, chunk: pq.ColumnChunkMetaData) -> int:
    if not chunk.num_values:
        # Arrow reads no page then, and there may be none.
        return 0
    at = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
    stop, total = at + chunk.total_compressed_size, 0
    if not 0 <= at <= stop <= len(data):
        raise ValueError(f"pages at {at}..{stop} of a file of {len(data)} bytes")
    while at < stop:
        header, at = _struct(data, at)
        uncompressed, compressed = header.get(UNCOMPRESSED, -1), header.get(COMPRESSED, -1)
        if uncompressed < 0 or compressed < 0:
            raise ValueError(f"a page of {compressed} bytes that become {uncompressed}")
        total += uncompressed
        at += compressed
    return total


def _struct(data: mmap.mmap, at: int, depth: int = 0) -> tuple[dict[int, int], int]:
    """(whole numbers by field, where the next byte is)"""
    if depth > MAX_DEPTH:
        raise ValueError("a page header nested too deep")
    numbers: dict[int, int] = {}
    field = 0
    while True:
        head, at = _byte(data, at)
        if head == 0:
            return numbers, at
        if head >> 4:
            field += head >> 4
        else:
            field, at = _zigzag(data, at)
        kind = head & 15
        if kind in INTEGERS:
            numbers[field], at = _zigzag(data, at)
        elif kind not in (TRUE, FALSE):
            # A field's bool is in its head.
            at = _skip(data, at, kind, depth)


def _skip(data: mmap.mmap, at: int, kind: int, depth: int) -> int:
    if kind in (TRUE, FALSE, BYTE):
        return at + 1
    if kind in INTEGERS:
        return _varint(data, at)[1]
    if kind == DOUBLE:
        return at + DOUBLE_BYTES
    if kind == BINARY:
        size, at = _varint(data, at)
        return at + size
    if kind in LISTS and depth <= MAX_DEPTH:
        head, at = _byte(data, at)
        count = head >> 4
        if count == 15:
            count, at = _varint(data, at)
        for _ in range(count):
            at = _skip(data, at, head & 15, depth + 1)
        return at
    if kind == STRUCT:
        return _struct(data, at, depth + 1)[1]
    raise ValueError(f"a page header with a field of kind {kind}")


def _zigzag(data: mmap.mmap, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte, at = _byte(data, at)
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a page header with a number without end")


def _byte(data: mmap.mmap, at: int) -> tuple[int, int]:
    if at >= len(data):
        raise ValueError("a page header behind the end of the file")
    return data[at], at + 1
