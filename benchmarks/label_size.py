"""Bytes per crop of a label block, column by column, for the encodings that were tried, on real labels.

    python benchmarks/label_size.py LABELS [--reshape 50]

The shards of a label set of layout parquet (one crop block; it may be unfinished) are put into one block; a block
of a large data set has 4,096 images. With `--reshape`, rows of many crops are cut into rows of so many first, so that
few photos with many crops make a block of the usual shape. "readers" are those of the table in docs/format.md. Peers
on ImageNet, top-5: FKD 42.8 bytes (its fp16 files), Dataset Reinforcement 36.7.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ferkd_data.format import parquet
from ferkd_data.labels.rows import CROP_FIELDS, ShardLabels

ALL, NEW = "all", "new ones only"
ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (ALL, {"use_dictionary": False}),
    "dictionary": (ALL, {"use_dictionary": True}),
    "delta": ("not Polars 1.0", {"use_dictionary": False, "encoding": "DELTA_BINARY_PACKED"}),
    "byte stream split": (NEW, {"use_dictionary": False, "encoding": "BYTE_STREAM_SPLIT"}),
}
LEVELS = (9, 19)


def read_all(folder: Path) -> ShardLabels:
    """The rows of all files of crop block 0."""
    parts = []
    for path in sorted(folder.glob("labels/*-000.parquet")):
        with pq.ParquetFile(path) as file:
            described, rows = file.schema_arrow, file.metadata.num_rows
        num_crops = described.field("flip").type.list_size
        top_k = described.field("class_index").type.list_size // num_crops
        parts.append(parquet.read_labels(path, rows=rows, num_crops=num_crops, top_k=top_k, num_classes=1000))
    arrays: dict[str, Any] = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(ShardLabels)
        if field.name != "keys"
    }
    return ShardLabels(keys=[key for part in parts for key in part.keys], **arrays)


def reshaped(labels: ShardLabels, crops: int) -> ShardLabels:
    """Rows of `crops` crops each, from rows of a multiple of that."""
    times = labels.num_crops // crops
    changed: dict[str, Any] = {
        name: getattr(labels, name)[:, : times * crops].reshape(
            len(labels) * times, crops, *getattr(labels, name).shape[2:]
        )
        for name in CROP_FIELDS
    }
    for name in ("image_digest", "height", "width", "target"):
        changed[name] = np.repeat(getattr(labels, name), times, axis=0)
    keys = [f"{key}-{i:03d}" for key in labels.keys for i in range(times)]
    return replace(labels, keys=keys, **changed)


def size_of(column: pa.Array, encoding: str | None, level: int, **options: Any) -> tuple[int, float]:
    """(compressed bytes, seconds of CPU) of one list column alone."""
    sink = pa.BufferOutputStream()
    if encoding:
        options["column_encoding"] = {"c.list.element": encoding}
    began = time.process_time()
    pq.write_table(
        pa.table({"c": column}),
        sink,
        compression="zstd",
        compression_level=level,
        row_group_size=len(column),
        write_statistics=False,
        data_page_version="1.0",
        data_page_size=parquet.PAGE_SIZE_BYTES,
        **options,
    )
    seconds = time.process_time() - began
    with pq.ParquetFile(pa.BufferReader(sink.getvalue())) as file:
        return file.metadata.row_group(0).column(0).total_compressed_size, seconds


def tried(labels: ShardLabels, num_crops: int) -> None:
    """Every column in every encoding that fits its type; probabilities also as float16, for comparison."""
    table = parquet.to_table(labels)
    columns = {name: table.column(name).combine_chunks() for name in table.column_names if name in LISTS}
    for name in parquet.PROB_COLUMNS:
        half = columns[name].flatten().cast(pa.float16())
        columns[f"{name} as FLOAT16"] = pa.FixedSizeListArray.from_arrays(half, columns[name].type.list_size)
    print("| column | encoding | readers | bytes per crop, zstd 9 | zstd 19 | us of CPU per crop, zstd 9 | zstd 19 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, column in columns.items():
        for label, (readers, options) in ENCODINGS.items():
            encoding = options.get("encoding")
            if encoding == "DELTA_BINARY_PACKED" and not pa.types.is_integer(column.type.value_type):
                continue
            if encoding and pa.types.is_boolean(column.type.value_type):
                continue
            who = NEW if "FLOAT16" in name else readers
            found = [size_of(column, encoding, level, use_dictionary=options["use_dictionary"]) for level in LEVELS]
            sizes = " | ".join(f"{size / num_crops:.2f}" for size, _ in found)
            costs = " | ".join(f"{seconds * 1e6 / num_crops:.2f}" for _, seconds in found)
            print(f"| {name} | {label} | {who} | {sizes} | {costs} |")


LISTS = (*parquet.BOX_COLUMNS, "flip", "class_index", *parquet.PROB_COLUMNS, "bucket")


def written(labels: ShardLabels, num_crops: int) -> None:
    """What `build` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.parquet"
        began = time.process_time()
        parquet.write(path, labels)
        cost = (time.process_time() - began) * 1e6 / num_crops
        size = path.stat().st_size / num_crops
        print(f"\n{size:.2f} bytes per crop as build writes it, {cost:.2f} us of CPU per crop:\n")
        with pq.ParquetFile(path) as file:
            group = file.metadata.row_group(0)
            for number in range(group.num_columns):
                column = group.column(number)
                name = column.path_in_schema.split(".")[0]
                print(f"{column.total_compressed_size / num_crops:>7.3f}    {name}")
        times = []
        for _ in range(7):
            began = time.process_time()
            parquet.read_labels(
                path,
                rows=len(labels),
                num_crops=labels.num_crops,
                top_k=labels.class_index.shape[2],
                num_classes=1000,
            )
            times.append((time.process_time() - began) * 1000 / len(labels))
        print(
            f"\nreading: {sorted(times)[3]:.4f} ms of CPU per image and block of {labels.num_crops} crops (median of 7)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", type=Path)
    parser.add_argument("--reshape", type=int)
    args = parser.parse_args()
    labels = read_all(args.labels)
    if args.reshape:
        labels = reshaped(labels, args.reshape)
    num_crops = len(labels) * labels.num_crops
    print(f"{len(labels)} rows of {labels.num_crops} crops, top-{labels.class_index.shape[2]}\n")
    tried(labels, num_crops)
    written(labels, num_crops)


if __name__ == "__main__":
    main()
