"""What we write, read by libraries that know nothing of us."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import ferkd_data as fd
from ferkd_data.builder.shard_files import FOLDER
from ferkd_data.format import crop_arrays, parquet, webdataset
from ferkd_data.labels.rows import CROP_FIELDS


@pytest.fixture
def first(label_set):
    labels = fd.open_labels(label_set)
    return label_set / "labels/00000-001.parquet", labels.shard(0).crop_range(4, 8)


def test_duckdb(first):
    import duckdb

    path, expected = first
    rows = duckdb.sql(
        f"select key, target, height, box_top, flip, class_index, class_prob, target_prob, bucket from '{path}'"
    ).fetchall()
    assert [row[0] for row in rows] == list(expected.keys)
    for i, (_, target, height, top, flip, index, prob, target_prob, bucket) in enumerate(rows):
        assert (target, height) == (expected.target[i], 48)
        assert list(top) == expected.boxes[i, :, 0].tolist()
        assert list(flip) == expected.flip[i].tolist()
        assert list(index) == expected.class_index[i].reshape(-1).tolist()
        assert list(prob) == expected.class_prob[i].reshape(-1).tolist()
        assert list(target_prob) == expected.target_prob[i].tolist()
        assert list(bucket) == expected.bucket[i].tolist()
    top1 = duckdb.sql(f"select avg(class_prob[1]) from '{path}'").fetchall()[0][0]
    assert top1 == pytest.approx(expected.class_prob[:, 0, 0].astype(float).mean())


def test_polars(first):
    import polars

    path, expected = first
    frame = polars.read_parquet(path)
    assert frame["key"].to_list() == list(expected.keys)
    assert np.array_equal(frame["class_prob"].to_numpy().reshape(expected.class_prob.shape), expected.class_prob)
    assert np.array_equal(frame["box_left"].to_numpy(), expected.boxes[:, :, 1])


def test_pandas(first):
    import pandas

    path, expected = first
    frame = pandas.read_parquet(path)
    assert frame["key"].tolist() == list(expected.keys)
    assert np.array_equal(np.stack(frame["class_index"]).reshape(expected.class_index.shape), expected.class_index)
    assert np.array_equal(np.stack(frame["flip"]), expected.flip)


def test_the_layout_is_designs(label_set, tar_label_set):
    def names(folder):
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    blocks = [f"labels/0000{shard}-00{block}.parquet" for shard in range(3) for block in range(3)]
    assert names(label_set) == [*blocks, "manifest.json", "rejects.parquet"]
    tars = [f"shards/0000{shard}.tar" for shard in range(3)]
    assert names(tar_label_set) == ["manifest.json", "rejects.parquet", *tars]
    assert not (label_set / FOLDER).exists()


def test_unlabelled_images_have_null_in_parquet_and_no_cls_in_tars(tmp_path, tiny_teachers):
    import duckdb

    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    for layout in ("parquet", "webdataset"):
        out = tmp_path.parent / f"{tmp_path.name}-{layout}"
        fd.build(tmp_path, out, teachers=[tiny_teachers], crops=3, layout=layout, device="cpu")
        image = fd.open_labels(out)["a"]
        assert image.target == -1 and np.isnan(image.target_prob).all()
    assert [sample.target for sample in webdataset.scan(out / "shards/00000.tar")] == [-1]
    path = tmp_path.parent / f"{tmp_path.name}-parquet/labels/00000-000.parquet"
    row = duckdb.sql(f"select target, target_prob, bucket from '{path}'").fetchall()[0]
    assert row[0] is None and list(row[1]) == [None] * 3 and len(row[2]) == 3


def test_labels_survive_their_members(label_set):
    image = fd.open_labels(label_set)[3]
    members = crop_arrays.to_members(image)
    fields = crop_arrays.from_members(members, "here")
    for name in set(CROP_FIELDS) - {"operations"}:
        assert np.array_equal(fields[name], getattr(image, name)) and fields[name].dtype == getattr(image, name).dtype
    for data in members.values():
        assert np.array_equal(np.load(io.BytesIO(data), allow_pickle=False), crop_arrays.parse_npy(data, "here"))


def test_the_published_schema_is_what_is_written(label_set):
    import pyarrow.parquet as pq

    path = label_set / "labels/00000-000.parquet"
    assert pq.read_schema(path).equals(parquet.schema(4, 4, np.uint16))


@pytest.mark.parametrize("crops", [1, parquet.DICTIONARY_CROPS])
def test_nothing_is_written_that_readers_of_two_years_ago_do_not_know(label_set, tmp_path, crops):
    """Types by Parquet's own names, encodings, compression, page version; with a page index for each column."""
    import pyarrow.parquet as pq

    one = fd.open_labels(label_set).shard(0)
    rows = one.take(np.arange(-(-crops // one.num_crops)) % len(one))
    parquet.write(tmp_path / "block.parquet", rows)
    with pq.ParquetFile(tmp_path / "block.parquet") as file:
        group = file.metadata.row_group(0)
        columns = [group.column(i) for i in range(group.num_columns)]
    assert {column.physical_type for column in columns} == {
        "BYTE_ARRAY",
        "INT32",
        "BOOLEAN",
        "FLOAT",
    }
    assert {encoding for column in columns for encoding in column.encodings} == {"PLAIN", "RLE", "RLE_DICTIONARY"}
    assert {column.compression for column in columns} == {"ZSTD"}
    assert all(column.has_offset_index for column in columns)
