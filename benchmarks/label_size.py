"""Bytes per crop of a label block, for encodings that were tried, on real labels.

    ferkd-data demo DEMO --crops 1000        (or any label set of layout parquet)
    python benchmarks/label_size.py DEMO/labels [--reshape 50]

The rows of the first shard are cut into rows of `--reshape` crops, so that few photos with many crops make a block of
the usual shape. Every variant holds the same values unless it says otherwise. Peers on ImageNet, top-5: FKD 42.8 bytes
(its fp16 files), Dataset Reinforcement 36.7.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import ferkd_data as fd
from ferkd_data.shards import parquet
from ferkd_data.shards.columns import CROP_FIELDS, ShardLabels

BOXES = [f"{name}.list.element" for name in parquet.BOX_COLUMNS]
INDEX, PROB, TARGET = "class_index.list.element", "class_prob.list.element", "target_prob.list.element"


def reshaped(labels: ShardLabels, crops: int) -> ShardLabels:
    """Rows of `crops` crops each, from rows of a multiple of that."""
    times = labels.num_crops // crops
    fields: dict[str, Any] = {
        name: getattr(labels, name)[:, : times * crops].reshape(
            len(labels) * times, crops, *getattr(labels, name).shape[2:]
        )
        for name in CROP_FIELDS
    }
    for name in ("image_digest", "height", "width", "target"):
        fields[name] = np.repeat(getattr(labels, name), times, axis=0)
    keys = [f"{key}-{i:03d}" for key in labels.keys for i in range(times)]
    return replace(labels, keys=keys, **fields)


def rounded(labels: ShardLabels, step: float) -> ShardLabels:
    """Probabilities on a grid: at most step / 2 is lost."""

    def grid(values: np.ndarray) -> np.ndarray:
        return (np.rint(values.astype(np.float64) / step) * step).astype(np.float16)

    return replace(labels, class_prob=grid(labels.class_prob), target_prob=grid(labels.target_prob))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", type=Path)
    parser.add_argument("--reshape", type=int, default=50)
    args = parser.parse_args()
    opened = fd.open_labels(args.labels)
    labels = reshaped(opened.shard(0), args.reshape)
    num_crops = len(labels) * labels.num_crops
    print(f"{len(labels)} rows of {labels.num_crops} crops, top-{opened.top_k}; bytes per crop\n")
    split = dict.fromkeys(BOXES, "BYTE_STREAM_SPLIT")
    zstd = {"compression": "zstd", "compression_level": 9}
    variants: dict[str, tuple[ShardLabels, dict[str, Any]]] = {
        "plain, no compression": (labels, {"use_dictionary": False, "compression": "none"}),
        "pyarrow's defaults (dictionary, snappy)": (labels, {}),
        "dictionary everywhere, zstd": (labels, zstd),
        "no dictionary, zstd": (labels, {"use_dictionary": False, **zstd}),
        "boxes byte-split": (labels, {"use_dictionary": [INDEX], "column_encoding": split, **zstd}),
        "boxes byte-split, dictionary for classes and probabilities": (
            labels,
            {"use_dictionary": [INDEX, PROB], "column_encoding": split, **zstd},
        ),
        "the same, target_prob as dictionary too": (
            labels,
            {"use_dictionary": [INDEX, PROB, TARGET], "column_encoding": split, **zstd},
        ),
        "boxes and float16 byte-split (DuckDB cannot read it)": (
            labels,
            {
                "use_dictionary": [INDEX],
                "column_encoding": {**split, PROB: "BYTE_STREAM_SPLIT", TARGET: "BYTE_STREAM_SPLIT"},
                **zstd,
            },
        ),
        "probabilities rounded to 1/1024, dictionary": (
            rounded(labels, 2.0**-10),
            {"use_dictionary": [INDEX, PROB, TARGET], "column_encoding": split, **zstd},
        ),
        "probabilities rounded to 1/1024, plain": (
            rounded(labels, 2.0**-10),
            {"use_dictionary": [INDEX], "column_encoding": split, **zstd},
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.parquet"
        for name, (content, options) in variants.items():
            pq.write_table(parquet.to_table(content), path, **options)
            print(f"{path.stat().st_size / num_crops:>7.2f}  {name}")
        parquet.write(path, labels)
        print(f"{path.stat().st_size / num_crops:>7.2f}  AS WRITTEN BY build\n")
        show_columns(path, num_crops)
        times = []
        for _ in range(7):
            started = time.perf_counter()
            parquet.read_labels(
                path,
                rows=len(labels),
                num_crops=labels.num_crops,
                top_k=opened.top_k,
                num_classes=opened.num_classes,
            )
            times.append((time.perf_counter() - started) * 1000 / len(labels))
        print(f"\nreading: {sorted(times)[3]:.4f} ms per image and block of {labels.num_crops} crops (median of 7)")


def show_columns(path: Path, num_crops: int) -> None:
    group = pq.ParquetFile(path).metadata.row_group(0)
    for i in range(group.num_columns):
        column = group.column(i)
        print(f"{column.total_compressed_size / num_crops:>7.2f}    {column.path_in_schema.split('.')[0]}")


if __name__ == "__main__":
    main()
