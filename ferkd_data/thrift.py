"""Thrift's compact protocol, as far as Parquet's footers and page headers need it: numbers, bytes, lists and structs.

A byte may become 100 in memory, so callers hand in no more than they can afford.
"""

from __future__ import annotations

from typing import Any

TRUE, FALSE, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 12
MAX_DEPTH = 16
DOUBLE_BYTES = 8
LONG_LIST = 15
"""Stands where a list's length is, when a number with the length follows."""


def read_struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """(fields by their numbers, where the next byte is). Raises ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError("structs nested too deep")
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head, at = _byte(data, at)
        if head == 0:
            return fields, at
        if head >> 4:
            number += head >> 4
        else:
            number, at = _zigzag(data, at)
        kind = head & 15
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
        size, at = _varint(data, at)
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
        count, at = _varint(data, at)
    items = []
    for _ in range(count):
        item, at = _value(data, at, head & 15, depth)
        items.append(item)
    return items, at


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
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
        raise ValueError("bytes behind the end")
    return data[at], at + 1
