"""What a Parquet file's footer and page headers claim, read before Arrow believes them.

Arrow takes memory for each page as its header says, whatever the footer's totals are: a file of 12 kB made it take 800
MB. And some footers end the whole process when PyArrow is asked about a column (found by fuzzing). So both are read
here first.
"""

from __future__ import annotations

import mmap
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferkd_data.shards.thrift import read_struct

MAGIC = b"PAR1"
TAIL_BYTES = 8
MAX_FOOTER_BYTES, MAX_PAGE_HEADER_BYTES = 2**20, 2**16
"""A block file of a build has a footer of 5 kB, and page headers below 3 kB."""
NUM_ROWS, ROW_GROUPS = 3, 4
GROUP_COLUMNS, GROUP_ROWS = 1, 3
CHUNK_METADATA = 3
PATH, NUM_VALUES, UNCOMPRESSED, COMPRESSED, DATA_PAGE, DICTIONARY_PAGE = 3, 5, 6, 7, 9, 11
PAGE_UNCOMPRESSED, PAGE_COMPRESSED = 2, 3
"""Numbers of fields in Parquet's Thrift definition."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One column of one row group."""

    column: str
    rows: int
    values: int
    bytes: int
    """In memory: what the footer claims, or all its page headers together where that is more."""


@dataclass(frozen=True, kw_only=True)
class Claims:
    rows: int
    row_groups: int
    chunks: tuple[Chunk, ...]


def read_claims(path: Path, columns: list[str]) -> Claims:
    """What the file claims of these columns. Raises ValueError for a footer or page headers that cannot be."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        footer = _footer(data)
        groups = footer[ROW_GROUPS]
        try:
            chunks = tuple(chunk for group in groups for chunk in _chunks(data, group, columns))
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"its footer lacks what every footer has ({error})") from error
        return Claims(rows=footer[NUM_ROWS], row_groups=len(groups), chunks=chunks)


def _footer(data: mmap.mmap) -> dict[int, Any]:
    size = int.from_bytes(data[-TAIL_BYTES:-4], "little")
    if data[-4:] != MAGIC or not 0 < size <= min(MAX_FOOTER_BYTES, len(data) - TAIL_BYTES):
        raise ValueError(f"a footer of {size} bytes in {len(data)}")
    footer, _ = read_struct(data[-TAIL_BYTES - size : -TAIL_BYTES], 0)
    if not isinstance(footer.get(NUM_ROWS), int) or not isinstance(footer.get(ROW_GROUPS), list):
        raise ValueError("its footer has no rows or row groups")
    return footer


def _chunks(data: mmap.mmap, group: dict[int, Any], columns: list[str]) -> Iterator[Chunk]:
    for column in group[GROUP_COLUMNS]:
        metadata = column[CHUNK_METADATA]
        name = metadata[PATH][0].decode("utf-8", "replace")
        if name in columns:
            size = max(metadata[UNCOMPRESSED], _page_bytes(data, metadata))
            rows, values = operator.index(group[GROUP_ROWS]), operator.index(metadata[NUM_VALUES])
            yield Chunk(column=name, rows=rows, values=values, bytes=operator.index(size))


def _page_bytes(data: mmap.mmap, metadata: dict[int, Any]) -> int:
    if not metadata[NUM_VALUES]:
        # Arrow reads no page then, and there may be none.
        return 0
    at = min(metadata[DATA_PAGE], metadata.get(DICTIONARY_PAGE) or metadata[DATA_PAGE])
    stop, total = at + metadata[COMPRESSED], 0
    if not 0 <= at <= stop <= len(data):
        raise ValueError(f"pages at {at}..{stop} of a file of {len(data)} bytes")
    while at < stop:
        header, size = read_struct(data[at : at + MAX_PAGE_HEADER_BYTES], 0)
        uncompressed, compressed = header[PAGE_UNCOMPRESSED], header[PAGE_COMPRESSED]
        if uncompressed < 0 or compressed < 0:
            raise ValueError(f"a page of {compressed} bytes that become {uncompressed}")
        total += uncompressed
        at += size + compressed
    return total
