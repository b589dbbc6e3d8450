"""Published bytes per crop beside FKD's and Dataset Reinforcement's formats, for the same crops and the same k.

    ferkd-data demo DEMO --crops 4
    ferkd-data build DEMO/photos LABELS --teacher onnx:DEMO/teachers/efficientnet-lite0.onnx \\
        --classes DEMO/classes.txt --crops 1000
    python benchmarks/published_size.py LABELS [--crops 100]

The rows are cut into rows of `--crops` crops, so that few photos with many crops stand for many images of the usual
shape. The same labels are then written as each project's generator writes them: FKD one `torch.save` of NumPy arrays
[coords, flips, labels] per image (float32, or float16 with its --use_fp16), Dataset Reinforcement one `torch.save` of
(ID, crops) per image with compressed params (pickle protocol 4). What is downloaded is the tar.gz of these files. Our
probabilities are float16; before the others write them they get the bits back that rounding took, at random, since
rounded numbers would compress better than real ones.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from label_size import reshaped

import ferkd_data as fd
from ferkd_data.format.writers import write_shard
from ferkd_data.labels.rows import ImageLabels, ShardLabels

BLOCK = 50


def unrounded(prob: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """float32 values that float16 would round to these, or nearly."""
    step = np.spacing(prob).astype(np.float32)
    return prob.astype(np.float32) + step * (generator.random(prob.shape, np.float32) - 0.5)


def write_fkd(folder: Path, rows: list[ImageLabels], kind: type[np.floating], generator: np.random.Generator) -> None:
    for number, row in enumerate(rows):
        coords = row.boxes / np.array([row.height, row.width] * 2)
        soft = np.stack([row.class_index.astype(np.float32), unrounded(row.class_prob, generator)], axis=1)
        torch.save([kind(coords), row.flip.copy(), kind(soft)], folder / f"{number}.tar")


def write_dr(folder: Path, rows: list[ImageLabels], generator: np.random.Generator) -> None:
    for number, row in enumerate(rows):
        prob = unrounded(row.class_prob, generator)
        samples = [
            {"params": [tuple(box), flip], "prob": (probs, classes)}
            for box, flip, probs, classes in zip(
                row.boxes.tolist(), row.flip.tolist(), prob.tolist(), row.class_index.tolist(), strict=True
            )
        ]
        torch.save((number, samples), folder / f"{number}.pth.tar", pickle_protocol=4)


def write_ours(folder: Path, rows: list[ImageLabels]) -> None:
    starts = range(0, len(rows[0].flip), BLOCK)
    write_shard(folder, 0, ((row, b"") for row in rows), layout="parquet", block_starts=starts)


def sizes(write: Callable[[Path], None], crops: int) -> tuple[float, float]:
    """(bytes per crop of the files, of their tar.gz)"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "files"
        folder.mkdir()
        write(folder)
        plain = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        packed = Path(name) / "files.tar.gz"
        with tarfile.open(packed, "w:gz", compresslevel=6) as tar:
            tar.add(folder, "files")
        return plain / crops, packed.stat().st_size / crops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, help="A label set of layout parquet.")
    parser.add_argument("--crops", type=int, default=100, help="Crops for each image.")
    arguments = parser.parse_args()
    opened = fd.open_labels(arguments.labels)
    if opened.num_crops < arguments.crops:
        raise SystemExit(f"{arguments.labels} has {opened.num_crops} crops for each image, fewer than --crops")
    rows = [row for shard in opened.shards() for row in cut(shard, arguments.crops)]
    crops = len(rows) * arguments.crops
    generator = np.random.default_rng(0)
    ways: dict[str, Callable[[Path], None]] = {
        "FKD, as its script writes": lambda folder: write_fkd(folder, rows, np.float32, generator),
        "FKD, its fp16 (inexact boxes)": lambda folder: write_fkd(folder, rows, np.float16, generator),
        "Dataset Reinforcement": lambda folder: write_dr(folder, rows, generator),
        "ferkd-data, parquet": lambda folder: write_ours(folder, rows),
    }
    found = {name: sizes(write, crops) for name, write in ways.items()}
    ours = found["ferkd-data, parquet"][0]
    print(f"{time.strftime('%Y-%m-%d')}: {len(rows)} images x {arguments.crops} crops, top-{opened.top_k}")
    print(f"\n| {'format':<30} | files | / ours | as tar.gz | / ours |\n| --- | ---: | ---: | ---: | ---: |")
    for name, (plain, packed) in found.items():
        print(f"| {name:<30} | {plain:5.1f} | {plain / ours:6.2f} | {packed:9.1f} | {packed / ours:6.2f} |")
    print("\nbytes per crop; the others are published packed, ours as it is: its files are read one by one")


def cut(shard: ShardLabels, crops: int) -> list[ImageLabels]:
    return list(reshaped(shard, crops))


if __name__ == "__main__":
    main()
