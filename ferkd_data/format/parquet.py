"""Layout `parquet`: labels only, one file per (image shard, crop block), one row per image.

Only types and encodings that every common reader of the last two years understands are written: 32-bit floats and
integers, plain or with a dictionary, in data pages of version 1. scripts/readers_matrix.py tries the readers,
benchmarks/label_size.py measures the encodings. Probabilities are float16 in memory and FLOAT in the file, because
FLOAT16 is misread by DuckDB 1.1 and fastparquet and stops Spark and Polars 1.14. Digests are BYTE_ARRAY, because
datasets 3.1 knows no bytes of fixed length.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ferkd_data.augment.operations import BOX_WORDS, Operations, check_operations
from ferkd_data.errors import ShardError, UsageError
from ferkd_data.labels.rows import (
    DIGEST_BYTES,
    UNKNOWN_TARGET,
    ShardLabels,
    class_index_dtype,
    shard_folder,
    to_float16,
)
from ferkd_data.parquet_guard import read_claims

BOX_COLUMNS = ("box_top", "box_left", "box_height", "box_width")
ERASE_COLUMNS = ("erase_top", "erase_left", "erase_height", "erase_width")
PROB_COLUMNS = ("class_prob", "target_prob")
"""Float16 values, stored as float32."""

# Level 19 would save 0.5 bytes a crop, for four times the CPU time of all writing (benchmarks/label_size.py).
COMPRESSION_LEVEL = 9
PAGE_SIZE_BYTES = 2**18
"""Bytes of a data page before compression: the least that a viewer reads to show a few rows."""
DICTIONARY_CROPS = 20_000
"""Crops from which a block gets dictionaries for its probabilities. These hold up to 15,361 values, all of 0..1."""


def file_name(shard: int, block: int) -> str:
    return f"{shard_folder('labels', shard)}/{shard:05d}-{block:03d}.parquet"


def schema(num_crops: int, top_k: int, index_dtype: Any, operation_words: int = 0) -> pa.Schema:
    """Return the schema of a block file with `num_crops` crops; published in docs/format.md."""

    def per_crop(value: pa.DataType, count: int = num_crops) -> pa.DataType:
        return pa.list_(pa.field("element", value), count)

    index_type = pa.from_numpy_dtype(np.dtype(index_dtype))
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("image_digest", pa.binary(), nullable=False),
            pa.field("height", pa.uint16(), nullable=False),
            pa.field("width", pa.uint16(), nullable=False),
            pa.field("target", pa.int32()),
            *(pa.field(name, per_crop(pa.uint16()), nullable=False) for name in BOX_COLUMNS),
            pa.field("flip", per_crop(pa.bool_()), nullable=False),
            pa.field("class_index", per_crop(index_type, num_crops * top_k), nullable=False),
            pa.field("class_prob", per_crop(pa.float32(), num_crops * top_k), nullable=False),
            pa.field("target_prob", per_crop(pa.float32()), nullable=False),
            pa.field("bucket", per_crop(pa.uint8()), nullable=False),
            *_operation_fields(num_crops, operation_words),
        ],
        metadata={b"ferkd_data.format": b"1", b"ferkd_data.top_k": str(top_k).encode()},
    )


def _operation_fields(num_crops: int, words: int) -> list[pa.Field]:
    """Return the columns of recorded operations: none without any, no codes where only boxes are erased."""
    if not words:
        return []

    def per_crop(name: str, value: pa.DataType, count: int) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("element", value), num_crops * count), nullable=False)

    slots = (words - BOX_WORDS) // 2
    listed = [per_crop("op_code", pa.uint8(), slots), per_crop("op_value", pa.int16(), slots)] if slots else []
    return [*listed, *(per_crop(name, pa.uint16(), 1) for name in ERASE_COLUMNS)]


def _operation_columns(words: npt.NDArray[np.uint16]) -> dict[str, pa.Array]:
    if not words.shape[-1]:
        return {}
    operations = Operations.unpack(words.reshape(-1, words.shape[-1]))
    return {
        "op_code": pa.array(operations.codes.reshape(-1)),
        "op_value": pa.array(operations.values.reshape(-1)),
        **{name: pa.array(operations.erase[:, i]) for i, name in enumerate(ERASE_COLUMNS)},
    }


def to_table(labels: ShardLabels) -> pa.Table:
    num_crops, top_k = labels.class_index.shape[1:]
    layout = schema(num_crops, top_k, labels.class_index.dtype, labels.operations.shape[2])
    # Unknown values are NaN or -1 in memory and null in the file, where other tools expect nulls.
    unknown_prob = np.isnan(labels.target_prob).reshape(-1)
    columns = {
        "key": pa.array(list(labels.keys), pa.string()),
        "image_digest": pa.array([digest.tobytes() for digest in labels.image_digest], pa.binary()),
        "height": pa.array(labels.height),
        "width": pa.array(labels.width),
        "target": pa.array(labels.target, mask=labels.target == UNKNOWN_TARGET),
        **{name: pa.array(labels.boxes[:, :, i].reshape(-1)) for i, name in enumerate(BOX_COLUMNS)},
        "flip": pa.array(labels.flip.reshape(-1)),
        "class_index": pa.array(labels.class_index.reshape(-1)),
        "class_prob": pa.array(labels.class_prob.reshape(-1).astype(np.float32)),
        "target_prob": pa.array(labels.target_prob.reshape(-1).astype(np.float32), mask=unknown_prob),
        "bucket": pa.array(labels.bucket.reshape(-1)),
        **_operation_columns(labels.operations),
    }
    arrays = [
        # Without a copy: a list of fixed size is its flat values and a length.
        pa.FixedSizeListArray.from_arrays(columns[field.name], type=field.type)
        if pa.types.is_fixed_size_list(field.type)
        else columns[field.name]
        for field in layout
    ]
    return pa.Table.from_arrays(arrays, schema=layout)


def write(path: Path, labels: ShardLabels) -> None:
    """Write one block file. The caller renames it when it is whole."""
    table = to_table(labels)
    operations = [name for name in ("op_code", "op_value", *ERASE_COLUMNS) if name in table.column_names]
    # Not class_index, for which a dictionary took 0.3 bytes a crop more (benchmarks/label_size.py).
    with_dictionary = ["target", *(f"{name}.list.element" for name in (*BOX_COLUMNS, "bucket", *operations))]
    # Below that, the dictionary would take more than it saves.
    if len(labels) * labels.num_crops >= DICTIONARY_CROPS:
        with_dictionary += [f"{name}.list.element" for name in PROB_COLUMNS]
    pq.write_table(
        table,
        # Absolute: Arrow takes a relative path with a colon in it for a URI.
        path.absolute(),
        compression="zstd",
        compression_level=COMPRESSION_LEVEL,
        # One row group: a reader wants all images of a block, and statistics for several would repeat themselves.
        row_group_size=max(len(labels), 1),
        use_dictionary=with_dictionary,
        # Pages of version 1 and these encodings are what readers of the last two years understand (docs/format.md).
        data_page_version="1.0",
        data_page_size=PAGE_SIZE_BYTES,
        # Minimum and maximum of a list column help no reader.
        write_statistics=["key", "target"],
        write_page_index=True,
        # Arrow's own schema, from which our reader has the lists' fixed size: Parquet knows lists of any length only.
        store_schema=True,
    )


MAX_TEXT_BYTES = 1100
"""Bytes that a text may take in a column chunk; keys have at most 1,024."""
PAGE_BYTES = 65536
"""Bytes that a column chunk may take besides its values."""
MAX_DECODED_BYTES, MAX_EXPANSION = 2**30, 100
"""Bytes that a block may take in memory: a fixed number, or a multiple of its file (2 to 20 in builds)."""
NULLABLE = ("target", "target_prob")


def read_labels(
    path: Path, *, rows: int, num_crops: int, top_k: int, num_classes: int, operation_words: int = 0
) -> ShardLabels:
    """Read one block file as arrays.

    Raises ShardError when the file is missing or truncated, when a column is missing or of another type, when it
    does not hold what the manifest says (checked in the footer and the page headers, before memory is taken).
    """
    index_dtype = class_index_dtype(num_classes)
    table = _read(path, schema(num_crops, top_k, index_dtype, operation_words), rows)

    def lists(name: str) -> npt.NDArray[Any]:
        # The table has a chunk for each row group, and files of others may have many.
        flat = table.column(name).combine_chunks().flatten()
        if flat.null_count and name not in NULLABLE:
            raise ShardError(f"{path}: column {name!r} holds nulls")
        return _numpy(flat).reshape(rows, -1)

    def values(name: str) -> npt.NDArray[Any]:
        return _numpy(table.column(name).combine_chunks())

    class_index = lists("class_index").reshape(rows, num_crops, top_k)
    target = table.column("target").combine_chunks().fill_null(UNKNOWN_TARGET)
    return ShardLabels(
        keys=_texts(path, table, "key"),
        image_digest=_digests(path, table.column("image_digest")),
        height=values("height"),
        width=values("width"),
        target=_numpy(target),
        boxes=np.stack([lists(name) for name in BOX_COLUMNS], axis=2),
        flip=lists("flip"),
        class_index=class_index,
        class_prob=to_float16(lists("class_prob")).reshape(rows, num_crops, top_k),
        target_prob=to_float16(lists("target_prob")),
        bucket=lists("bucket"),
        operations=_packed_operations(path, lists, (rows, num_crops, operation_words)),
    )


def _packed_operations(
    path: Path, lists: Callable[[str], npt.NDArray[Any]], shape: tuple[int, int, int]
) -> npt.NDArray[np.uint16]:
    """Return the operations (R, N, W) of a file, checked against their list. Raises ShardError."""
    if not shape[2]:
        return np.empty(shape, np.uint16)
    crops, slots = shape[0] * shape[1], (shape[2] - BOX_WORDS) // 2
    none = np.zeros((crops, 0), np.int64)
    operations = Operations(
        codes=(lists("op_code").reshape(crops, slots) if slots else none).astype(np.uint8),
        values=(lists("op_value").reshape(crops, slots) if slots else none).astype(np.int16),
        erase=np.stack([lists(name).reshape(-1) for name in ERASE_COLUMNS], axis=1).astype(np.uint16),
    )
    try:
        check_operations(operations)
    except UsageError as error:
        raise ShardError(f"{path}: {error}") from error
    return operations.pack().reshape(shape)


def read_keys(path: Path, *, rows: int) -> list[str]:
    """Read the column of keys. Raises ShardError as `read_labels` does."""
    return read_texts(path, "key", rows=rows)


def read_targets(path: Path, *, rows: int) -> npt.NDArray[np.int32]:
    """Read the ground truths (rows,), -1 where unknown, unchecked. Raises ShardError as `read_labels` does."""
    table = _read(path, pa.schema([schema(1, 1, np.uint16).field("target")]), rows)
    return np.asarray(_numpy(table.column("target").combine_chunks().fill_null(UNKNOWN_TARGET)), np.int32)


def read_texts(path: Path, column: str, *, rows: int, longest: int = MAX_TEXT_BYTES) -> list[str]:
    """Read a column of texts of at most `longest` bytes. Raises ShardError as `read_labels` does."""
    wanted = pa.schema([pa.field(column, pa.string())])
    return _texts(path, _read(path, wanted, rows, longest), column, longest)


def _texts(path: Path, table: pa.Table, name: str, longest: int = MAX_TEXT_BYTES) -> list[str]:
    """Return the texts of a column. Rows share texts: one long text in a dictionary may stand for a million rows."""
    texts: list[str] = []
    for chunk in table.column(name).chunks:
        size = pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0
        if size > longest:
            raise ShardError(f"{path}: column {name!r} holds a text of {size} bytes")
        try:
            distinct = chunk.dictionary.to_pylist()
        except UnicodeDecodeError as error:
            raise ShardError(f"{path}: column {name!r} holds text that is not UTF-8 ({error})") from error
        texts += [distinct[index] for index in chunk.indices.to_pylist()]
    return texts


def _read(path: Path, expected: pa.Schema, rows: int, longest: int = MAX_TEXT_BYTES) -> pa.Table:
    # Texts are read as dictionaries: a small file may repeat one long text for a million rows.
    shared = [field.name for field in expected if _is_bytes(field.type)]
    try:
        _check_claims(path, expected, rows=rows, longest=longest)
        with pq.ParquetFile(path.absolute(), read_dictionary=shared) as file:
            # Only after the claims were checked: Arrow takes memory as a page header says.
            _check_schema(path, file.schema_arrow, expected)
            table = file.read(columns=expected.names, use_threads=False)
    except FileNotFoundError as error:
        raise ShardError(f"{path}: the shard is missing; restore it or build the label set again") from error
    except KeyError as error:
        raise ShardError(f"{path}: column {error.args[0].decode()!r} is missing") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ShardError(f"{path}: cannot be read as Parquet ({error})") from error
    for name in expected.names:
        if table.column(name).null_count and name not in NULLABLE:
            raise ShardError(f"{path}: column {name!r} holds nulls")
    return table


def _check_schema(path: Path, found: pa.Schema, expected: pa.Schema) -> None:
    for field in expected:
        if found.names.count(field.name) > 1:
            raise ShardError(f"{path}: column {field.name!r} is there twice")
        if field.name not in found.names:
            raise ShardError(f"{path}: column {field.name!r} is missing")
        actual = found.field(field.name).type
        if pa.types.is_dictionary(actual):
            actual = actual.value_type
        if not actual.equals(field.type) and not actual.equals(_draft_type(field)):
            raise ShardError(f"{path}: column {field.name!r} is {actual}, expected {field.type}")


def _draft_type(field: pa.Field) -> pa.DataType:
    """Return the type of a column in drafts of version 1, before 2026-11-27."""
    if field.name == "image_digest":
        return pa.binary(DIGEST_BYTES)
    if field.name in PROB_COLUMNS:
        return pa.list_(pa.field("element", pa.float16()), field.type.list_size)
    return field.type


def _check_claims(path: Path, expected: pa.Schema, *, rows: int, longest: int) -> None:
    # Of our columns alone: further ones are ignored (docs/format.md), whatever they claim.
    claims = read_claims(path, expected.names)
    if claims.rows != rows:
        raise ShardError(f"{path}: holds {claims.rows} rows, the manifest says {rows}")
    if claims.row_groups > max(rows, 1):
        raise ShardError(f"{path}: claims {claims.row_groups} row groups for {rows} rows")
    per_row = {field.name: getattr(field.type, "list_size", 1) for field in expected}
    # In bits: booleans have one. Texts and digests are read as indices of 32 bits into a dictionary.
    widths = [32 if _is_bytes(field.type) else _width(field.type) for field in expected]
    decoded = rows * sum(width * per_row[name] for name, width in zip(expected.names, widths, strict=True)) // 8
    if decoded > max(MAX_DECODED_BYTES, MAX_EXPANSION * path.stat().st_size):
        raise ShardError(f"{path}: {path.stat().st_size} bytes that would become {decoded} in memory")
    for chunk in claims.chunks:
        name = chunk.column
        # 20 bytes for each value are more than any of our types takes in any encoding.
        each = longest if pa.types.is_string(expected.field(name).type) else 20 * per_row[name]
        values, limit = per_row[name] * chunk.rows, PAGE_BYTES + chunk.rows * each
        if chunk.values != values or chunk.bytes > limit:
            raise ShardError(
                f"{path}: column {name!r} claims {chunk.values} values in {chunk.bytes} bytes; {values} values in at "
                f"most {limit} bytes are possible"
            )


def _width(kind: pa.DataType) -> int:
    """Return the bits of a value, or of a list's elements."""
    return int((kind.value_type if pa.types.is_fixed_size_list(kind) else kind).bit_width)


def _numpy(array: pa.Array) -> npt.NDArray[Any]:
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _is_bytes(kind: pa.DataType) -> bool:
    """Return whether values have no fixed length, so that a small file may share one among a million rows."""
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


def _digests(path: Path, column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """Return the digests (rows, 16). Raises ShardError for one of another length."""
    found = [np.empty((0, DIGEST_BYTES), np.uint8)]
    for chunk in column.chunks:
        values = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
        if pc.any(pc.not_equal(pc.binary_length(values), DIGEST_BYTES)).as_py():
            raise ShardError(f"{path}: column 'image_digest' holds a digest that has not {DIGEST_BYTES} bytes")
        digests = np.frombuffer(b"".join(values.to_pylist()), np.uint8).reshape(-1, DIGEST_BYTES)
        found.append(digests[_numpy(chunk.indices)] if pa.types.is_dictionary(chunk.type) else digests)
    return np.concatenate(found)
