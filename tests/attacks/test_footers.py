"""Parquet footers that would keep a reader busy or end its process: refused here, before Arrow is asked.

The same guard stands before label files and before tables of images.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_sets import relist
from PIL import Image

import ferkd_data as fd
from ferkd_data import parquet_guard
from ferkd_data.errors import ShardError, SourceError
from ferkd_data.images import open_source

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12
"""Kinds of fields in Thrift's compact protocol."""


def varint(number: int) -> bytes:
    said = b""
    while number > 127:
        said += bytes([number & 127 | 128])
        number >>= 7
    return said + bytes([number])


def number(value: int) -> bytes:
    return varint(value << 1)


def text(value: bytes) -> bytes:
    return varint(len(value)) + value


def struct(*fields: tuple[int, int, bytes]) -> bytes:
    said, last = b"", 0
    for field, kind, value in fields:
        said += bytes([(field - last) << 4 | kind]) + value
        last = field
    return said + b"\0"


def structs(items: list[bytes]) -> bytes:
    return bytes([15 << 4 | STRUCT]) + varint(len(items)) + b"".join(items)


def footer_of(schema: list[bytes], groups: list[bytes]) -> bytes:
    return struct((1, I32, number(1)), (2, LIST, structs(schema)), (3, I64, number(8)), (4, LIST, structs(groups)))


def nested(depth: int) -> bytes:
    """A column in so many groups, each in the one before: 100,000 end the process of PyArrow 15 to 22."""
    root = struct((4, BINARY, text(b"r")), (5, I32, number(1)))
    group = struct((3, I32, number(1)), (4, BINARY, text(b"a")), (5, I32, number(1)))
    leaf = struct((1, I32, number(1)), (3, I32, number(1)), (4, BINARY, text(b"key")))
    return footer_of([root, *[group] * depth, leaf], [])


def write_with(path: Path, body: bytes, footer: bytes) -> None:
    path.write_bytes(b"PAR1" + body + footer + len(footer).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("depth", [50, 999, 100_000])
def test_schemas_nested_deep(copy, depth):
    """In a process of its own, which an older Arrow would end."""
    write_with(copy / "labels/00000-000.parquet", b"", nested(depth))
    relist(copy)
    script = f"""
import ferkd_data as fd
try:
    fd.open_labels({str(copy)!r}).shard(0)
except fd.FerkdError as error:
    print(error)
assert not fd.verify({str(copy)!r}).ok
"""
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "a schema nested more than 16 levels deep" in said or f"a schema of {depth + 2} fields" in said


@pytest.mark.parametrize("depth", [70, 9_990, 100_000])
def test_tables_of_images_nested_deep(tmp_path, depth):
    """In a process of its own, which an older Arrow would end: given as a folder, a file and a pattern."""
    write_with(tmp_path / "x.parquet", b"", nested(depth))
    script = f"""
from ferkd_data.errors import SourceError
from ferkd_data.images import open_source
for source in ({str(tmp_path)!r}, {str(tmp_path / "x.parquet")!r}, {str(tmp_path / "*.parquet")!r}):
    try:
        open_source(source)
    except SourceError as error:
        print(error)
"""
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    reason = "a schema nested more than 64 levels deep" if depth < 10_000 else f"a schema of {depth + 2} fields"
    assert said.count(f"x.parquet: cannot be read as Parquet ({reason})") == 3, said


def test_a_footer_that_is_too_large_for_its_table(tmp_path):
    write_with(tmp_path / "x.parquet", b"", b"\0" * (parquet_guard.SOURCE_FOOTER_BYTES + 100_000))
    with pytest.raises(SourceError, match=r"cannot be read as Parquet \(a footer of \d+ bytes in \d+\)"):
        open_source(tmp_path)


@pytest.mark.parametrize("depth", [1, 15])
def test_tables_of_images_that_are_nested_honestly(tmp_path, depth):
    """Metadata beside the images may have lists of structs of lists."""
    value: object = 1
    for _ in range(depth):
        value = [{"a": value}]
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "JPEG")
    rows = [{"image": {"bytes": data.getvalue(), "path": f"{n}.jpg"}, "label": n, "more": value} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=2)
    source = open_source(tmp_path)
    refs = list(source.list_images())
    assert [ref.key for ref in refs] == list("01234") and len(list(source.read(refs))) == 5


def page(values: int) -> bytes:
    """An empty page of so many values, of which nothing is compressed."""
    data = struct((1, I32, number(values)), (2, I32, number(0)), (3, I32, number(3)), (4, I32, number(3)))
    return struct((1, I32, number(0)), (2, I32, number(0)), (3, I32, number(0)), (5, STRUCT, data))


def chunk(at: int, size: int) -> bytes:
    metadata = struct(
        (1, I32, number(6)),
        (3, LIST, bytes([1 << 4 | BINARY]) + text(b"key")),
        (4, I32, number(0)),
        (5, I64, number(1)),
        (6, I64, number(size)),
        (7, I64, number(size)),
        (9, I64, number(at)),
    )
    return struct((2, I64, number(at)), (3, STRUCT, metadata))


def group(at: int, size: int) -> bytes:
    return struct((1, LIST, structs([chunk(at, size)])), (2, I64, number(size)), (3, I64, number(1)))


KEY = [struct((4, BINARY, text(b"r")), (5, I32, number(1))), struct((1, I32, number(6)), (4, BINARY, text(b"key")))]
BODY = page(0) * 20_000
SLOW = {
    "many pages": (footer_of(KEY, [group(4, len(BODY))]), "more pages and column chunks than a file of"),
    "many chunks": (footer_of(KEY, [group(4, 0)] * 9000), "more pages and column chunks than a file of"),
    "the same pages again and again": (
        footer_of(KEY, [group(4, len(page(0)) * 100)] * 900),
        "more pages and column chunks than|chunks that overlap",
    ),
    "chunks over each other": (footer_of(KEY, [group(4, len(BODY) // 2)] * 3), "more pages|chunks that overlap"),
}


@pytest.mark.parametrize("name", SLOW)
def test_footers_that_keep_a_reader_busy(copy, name, monkeypatch):
    """Counted, not timed: structs that are read in all, without those inside of others."""
    read, limit = [], parquet_guard.FREE_PARTS + 2 * len(BODY) // parquet_guard.BYTES_PER_PART
    whole = parquet_guard.read_struct

    def counted(data, at, depth=0):
        read.extend([at] * (depth == 0))
        return whole(data, at, depth)

    monkeypatch.setattr(parquet_guard, "read_struct", counted)
    footer, message = SLOW[name]
    write_with(copy / "labels/00000-000.parquet", BODY, footer)
    relist(copy)
    with pytest.raises(ShardError, match=message):
        fd.open_labels(copy).shard(0)
    assert len(read) <= limit


@pytest.mark.parametrize("name", [name for name in SLOW if name != "many pages"])
def test_footers_that_keep_a_reader_of_images_busy(tmp_path, name):
    footer, message = SLOW[name]
    write_with(tmp_path / "x.parquet", BODY, footer)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path)


def test_chunks_that_lie_over_each_other(tmp_path):
    write_with(tmp_path / "x", page(0) * 200, footer_of(KEY, [group(4, len(page(0)) * 150)] * 2))
    with pytest.raises(ValueError, match="column chunks that overlap"):
        parquet_guard.read_claims(tmp_path / "x", ["key"])


def test_what_the_guard_lets_pass(tmp_path):
    """A file of many row groups and pages, in proportion to its size."""
    table = pa.table({"key": [f"{number:0900d}" for number in range(20_000)]})
    pq.write_table(table, tmp_path / "x", row_group_size=100, data_page_size=20_000, compression="none")
    claims = parquet_guard.read_claims(tmp_path / "x", ["key"])
    assert claims.rows == 20_000 and claims.row_groups == 200
    shutil.rmtree(tmp_path)
