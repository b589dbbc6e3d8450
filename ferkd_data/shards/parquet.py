"""Layout `parquet`: labels only, one file per (image shard, crop block), one row per image.

DuckDB, Polars and pandas read these files as they are. Encodings were chosen by benchmarks/label_size.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ferkd_data.errors import ShardError
from ferkd_data.shards.columns import DIGEST_BYTES, UNKNOWN_TARGET, ShardLabels

BOX_COLUMNS = ("box_top", "box_left", "box_height", "box_width")


def file_name(shard: int, block: int) -> str:
    return f"labels/{shard:05d}-{block:03d}.parquet"


def schema(num_crops: int, top_k: int, index_dtype: Any) -> pa.Schema:
    """Every column of a block file with `num_crops` crops; published in docs/format.md."""

    def per_crop(value: pa.DataType, count: int = num_crops) -> pa.DataType:
        return pa.list_(pa.field("element", value), count)

    index_type = pa.from_numpy_dtype(np.dtype(index_dtype))
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("image_digest", pa.binary(DIGEST_BYTES), nullable=False),
            pa.field("height", pa.uint16(), nullable=False),
            pa.field("width", pa.uint16(), nullable=False),
            pa.field("target", pa.int32()),
            *(pa.field(name, per_crop(pa.uint16()), nullable=False) for name in BOX_COLUMNS),
            pa.field("flip", per_crop(pa.bool_()), nullable=False),
            pa.field("class_index", per_crop(index_type, num_crops * top_k), nullable=False),
            pa.field("class_prob", per_crop(pa.float16(), num_crops * top_k), nullable=False),
            pa.field("target_prob", per_crop(pa.float16()), nullable=False),
            pa.field("bucket", per_crop(pa.uint8()), nullable=False),
        ],
        metadata={b"ferkd_data.format": b"1", b"ferkd_data.top_k": str(top_k).encode()},
    )


def to_table(labels: ShardLabels) -> pa.Table:
    num_crops, top_k = labels.class_index.shape[1:]
    layout = schema(num_crops, top_k, labels.class_index.dtype)
    unknown_prob = np.isnan(labels.target_prob).reshape(-1)
    columns = {
        "key": pa.array(list(labels.keys), pa.string()),
        "image_digest": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(DIGEST_BYTES), len(labels), [None, pa.py_buffer(labels.image_digest.tobytes())]
        ),
        "height": pa.array(labels.height),
        "width": pa.array(labels.width),
        "target": pa.array(labels.target, mask=labels.target == UNKNOWN_TARGET),
        **{name: pa.array(labels.boxes[:, :, i].reshape(-1)) for i, name in enumerate(BOX_COLUMNS)},
        "flip": pa.array(labels.flip.reshape(-1)),
        "class_index": pa.array(labels.class_index.reshape(-1)),
        "class_prob": pa.array(labels.class_prob.reshape(-1)),
        "target_prob": pa.array(labels.target_prob.reshape(-1), mask=unknown_prob),
        "bucket": pa.array(labels.bucket.reshape(-1)),
    }
    arrays = [
        pa.FixedSizeListArray.from_arrays(columns[field.name], type=field.type)
        if pa.types.is_fixed_size_list(field.type)
        else columns[field.name]
        for field in layout
    ]
    return pa.Table.from_arrays(arrays, schema=layout)


def write(path: Path, labels: ShardLabels) -> None:
    """Write one block file (not atomically: that is the caller's part)."""
    table = to_table(labels)
    byte_split = [name for name in (*BOX_COLUMNS, "class_prob", "target_prob")]
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=9,
        row_group_size=max(len(labels), 1),
        use_dictionary=["class_index.list.element", "target"],
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in byte_split},
        write_statistics=["key", "target"],
        store_schema=True,
    )


def read(path: Path, *, columns: list[str] | None = None) -> pa.Table:
    """Raises ShardError when the file is missing, truncated, or not a label block."""
    try:
        table = pq.read_table(path, columns=columns, memory_map=False, use_threads=False)
    except FileNotFoundError as error:
        raise ShardError(f"{path}: the shard is missing; restore it or build the label set again") from error
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{path}: cannot be read as a label block ({error})") from error
    return table


def read_labels(path: Path, *, top_k: int) -> ShardLabels:
    """One block file as arrays. Raises ShardError when a column is missing or of another type."""
    table = read(path)
    _check_schema(path, table.schema, top_k)
    rows = table.num_rows

    def flat(name: str) -> npt.NDArray[Any]:
        column = table.column(name).combine_chunks()
        return np.asarray(column.flatten().to_numpy(zero_copy_only=False))

    def lists(name: str) -> npt.NDArray[Any]:
        return flat(name).reshape(rows, -1)

    def values(name: str) -> npt.NDArray[Any]:
        return np.asarray(table.column(name).combine_chunks().to_numpy(zero_copy_only=False))

    digest = table.column("image_digest").combine_chunks()
    target = table.column("target").combine_chunks().fill_null(UNKNOWN_TARGET)
    return ShardLabels(
        keys=table.column("key").to_pylist(),
        image_digest=_fixed_binary(digest),
        height=values("height"),
        width=values("width"),
        target=np.asarray(target.to_numpy(zero_copy_only=False), np.int32),
        boxes=np.stack([lists(name) for name in BOX_COLUMNS], axis=2),
        flip=lists("flip"),
        class_index=lists("class_index").reshape(rows, -1, top_k),
        class_prob=lists("class_prob").reshape(rows, -1, top_k),
        target_prob=lists("target_prob").astype(np.float16),
        bucket=lists("bucket"),
    )


def read_keys(path: Path) -> list[str]:
    return list(read(path, columns=["key"]).column("key").to_pylist())


def _fixed_binary(array: pa.FixedSizeBinaryArray) -> npt.NDArray[np.uint8]:
    buffer = array.buffers()[1]
    flat = np.frombuffer(buffer, np.uint8) if buffer is not None else np.empty(0, np.uint8)
    start = array.offset * DIGEST_BYTES
    return flat[start : start + len(array) * DIGEST_BYTES].reshape(len(array), DIGEST_BYTES)


def _check_schema(path: Path, found: pa.Schema, top_k: int) -> None:
    missing = [name for name in schema(1, 1, np.uint16).names if name not in found.names]
    if missing:
        raise ShardError(f"{path}: column {missing[0]!r} is missing")
    flip = found.field("flip").type
    if not pa.types.is_fixed_size_list(flip):
        raise ShardError(f"{path}: column 'flip' is {flip}, expected a fixed-size list of bool")
    index = found.field("class_index").type
    index_dtype = np.uint32 if getattr(index, "value_type", None) == pa.uint32() else np.uint16
    for field in schema(flip.list_size, top_k, index_dtype):
        actual = found.field(field.name).type
        if actual != field.type:
            raise ShardError(f"{path}: column {field.name!r} is {actual}, expected {field.type}")
