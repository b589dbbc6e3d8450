"""Single values read from Parquet pages equal PyArrow's, or are left to PyArrow."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferkd_data.errors import ImageError
from ferkd_data.images import open_source, parquet_rows
from ferkd_data.images.parquet_pages import NotPlain, PagedColumn

VALUES = st.lists(st.binary(max_size=300), min_size=1, max_size=120)


def write(path: Path, values, *, struct: bool = True, **options) -> Path:
    column = [None if v is None else {"bytes": v, "path": "a.jpg"} for v in values] if struct else values
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    pq.write_table(pa.table({"image": pa.array(column, kind), "label": range(len(values))}), path, **options)
    return path


def paged(path: Path) -> PagedColumn:
    with pq.ParquetFile(path) as file:
        return PagedColumn(path, file, "image")


def read_or_leave(column: PagedColumn, row: int) -> bytes | None:
    try:
        return column.read(row)
    except NotPlain:
        return None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=VALUES,
    struct=st.booleans(),
    compression=st.sampled_from(["none", "snappy", "zstd", "gzip", "brotli", "lz4"]),
    version=st.sampled_from(["1.0", "2.0"]),
    dictionary=st.booleans(),
    group=st.integers(1, 150),
    page=st.sampled_from([100, 1000, 2**20]),
    batch=st.integers(1, 40),
    index=st.booleans(),
    seed=st.randoms(use_true_random=False),
)
def test_a_value_is_the_one_that_pyarrow_reads(
    tmp_path, values, struct, compression, version, dictionary, group, page, batch, index, seed
):
    path = write(
        tmp_path / "a.parquet",
        values,
        struct=struct,
        compression=compression,
        data_page_version=version,
        use_dictionary=dictionary,
        row_group_size=group,
        data_page_size=page,
        write_batch_size=batch,
        write_page_index=index,
    )
    column = paged(path)
    rows = list(range(len(values)))
    seed.shuffle(rows)
    for row in rows:
        found = read_or_leave(column, row)
        assert found == values[row] or (found is None and (dictionary or compression == "lz4"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.none() | st.binary(max_size=30), min_size=1, max_size=200),
    version=st.sampled_from(["1.0", "2.0"]),
)
def test_a_null_and_what_follows_it_are_left_to_pyarrow(tmp_path, values, version):
    path = write(tmp_path / "a.parquet", values, use_dictionary=False, data_page_version=version, compression="none")
    column = paged(path)
    for row, value in enumerate(values):
        found = read_or_leave(column, row)
        assert found == value if None not in values[: row + 1] else found is None


def test_values_larger_than_a_page_and_of_a_few_bytes(tmp_path):
    values = [random.Random(i).randbytes(size) for i, size in enumerate([3_000_000, 0, 17, 200_000, 1, 70_000, 70_000])]
    for compression in ("none", "zstd"):
        column = paged(write(tmp_path / "a.parquet", values, use_dictionary=False, compression=compression))
        assert [column.read(row) for row in range(len(values))] == values
        for row in (-1, len(values)):
            with pytest.raises(NotPlain):
                column.read(row)


def test_damage_gives_bytes_or_is_left_to_pyarrow(tmp_path):
    """Any byte of the pages may be wrong: the reader ends, with a value or with NotPlain."""
    values = [random.Random(i).randbytes(40) for i in range(60)]
    for version, compression in (("1.0", "none"), ("2.0", "none"), ("1.0", "snappy"), ("2.0", "zstd")):
        path = write(
            tmp_path / "a.parquet", values, use_dictionary=False, data_page_version=version, compression=compression,
            data_page_size=500, write_batch_size=8,
        )  # fmt: skip
        good = path.read_bytes()
        changed = random.Random(7)
        left = 0
        for _ in range(300):
            bad = bytearray(good)
            for _ in range(changed.choice([1, 1, 4])):
                bad[changed.randrange(4, len(good) - 1500)] = changed.randrange(256)
            path.write_bytes(bad)
            try:
                column = paged(path)
            except (OSError, pa.ArrowException):
                continue
            found = [read_or_leave(column, row) for row in range(0, 60, 7)]
            assert all(value is None or len(value) <= len(good) for value in found)
            left += None in found
        assert left


def test_another_file_in_its_place_is_left_to_pyarrow(tmp_path):
    column = paged(write(tmp_path / "a.parquet", [b"one", b"two"], use_dictionary=False))
    assert column.read(1) == b"two"
    write(tmp_path / "a.parquet", [b"three", b"four", b"five"], use_dictionary=False)
    with pytest.raises(NotPlain):
        column.read(1)


def test_lists_of_bytes_are_not_read(tmp_path):
    pq.write_table(pa.table({"image": [[b"a"], [b"b"]]}), tmp_path / "a.parquet")
    with pytest.raises(NotPlain):
        paged(tmp_path / "a.parquet")


def test_what_datasets_writes_is_read_without_pyarrow(tmp_path, monkeypatch, photos):
    """The library `datasets` writes images plainly: none of its rows needs a row group."""
    datasets = pytest.importorskip("datasets")
    contents = [path.read_bytes() for path in sorted(Path(photos).rglob("*.jpg"))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {
        "image": [{"bytes": c, "path": f"{i}.jpg"} for i, c in enumerate(contents)],
        "label": list(range(len(contents))),
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    refs = list(source.list_images())

    def none(*_):
        raise AssertionError("PyArrow was asked for a row")

    monkeypatch.setattr(parquet_rows.RowCursor, "advance_to", none)
    for ref in random.Random(0).sample(refs, len(refs)):
        assert source.read_one(ref) == contents[ref.offset]


def test_a_file_that_is_gone_is_an_unreadable_image(tmp_path, photos):
    content = next(Path(photos).rglob("*.jpg")).read_bytes()
    write(tmp_path / "a.parquet", [content, content + b" "])
    source = open_source(tmp_path / "a.parquet")
    first, second = source.list_images()
    assert source.read_one(first) == content
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ImageError, match=r"a\.parquet"):
        source.read_one(second)
