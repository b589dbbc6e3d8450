"""Does a crop cost the same in a large build as in a small one, and does memory stay flat?

    python benchmarks/build_growth.py [--images 1000 10000 100000] [--crops 4] [--rounds 3]

Pictures of 64x48 in class folders and a teacher that costs next to nothing, so that what a build itself does shows.
Each build runs in a process of its own, the sizes taking turns; medians of the rounds. CPU time is that of all threads:
on a machine that others use too, it says more than the wall clock. `label` is from the first answer to the last, `all`
the whole build with its plan and its manifest, but for the start of Python and the teacher.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER_IMAGES = 1000
CLASSES = 100
SHARD = 500
TEACHER = f"""
from torch import nn

class Cheap(nn.Module):
    preprocessing = {{"size": 32, "mean": (0.5,), "std": (0.25,)}}

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Linear(48, {CLASSES})

    def forward(self, x):
        return self.head(self.pool(x).flatten(1))

def cheap():
    import torch
    torch.manual_seed(0)
    return Cheap()
"""
COLUMNS = {
    "label_us": "us CPU/crop, label",
    "all_us": "us CPU/crop, all",
    "wall_us": "us wall/crop, all",
    "plan_s": "plan, s",
    "seal_s": "seal, s",
    "peak_mb": "MB, peak",
}


def write_photos(folder: Path, num_images: int) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    for number in range(num_images):
        path = folder / f"c{number // FOLDER_IMAGES:03d}"
        if number % FOLDER_IMAGES == 0:
            path.mkdir(parents=True)
        (path / f"p{number:07d}.jpg").write_bytes(buffer.getvalue())


class Marks:
    """When what happened, in seconds of the wall clock and of the CPU."""

    def __init__(self) -> None:
        self.at: dict[str, tuple[float, float, int]] = {}

    def see(self, event: object) -> None:
        name = type(event).__name__
        crops = getattr(event, "crops_done", 0)
        mark = (time.perf_counter(), time.process_time(), crops)
        if name == "Progress":
            self.at.setdefault("first", mark)
            self.at["last"] = mark
        else:
            self.at[name] = mark


def measure(photos: Path, crops: int) -> dict[str, float]:
    import torch

    import ferkd_data as fd

    torch.set_num_threads(1)  # more of them would wait for each other, which is CPU time too
    sys.path.insert(0, str(photos.parent))
    marks = Marks()
    with tempfile.TemporaryDirectory() as out:
        warm = Path(out) / "warm"
        arguments = {
            "teachers": ["python:cheap_teacher:cheap"],
            "classes": photos.parent / "classes.txt",
            "crops": crops,
            "crops_per_block": crops,
            "images_per_shard": SHARD,
            "device": "cpu",
            "workers": 1,
        }
        fd.build(photos.parent / "warm", warm, **arguments)  # type: ignore[arg-type]
        began = (time.perf_counter(), time.process_time())
        result = fd.build(photos, Path(out) / "out", watchers=[marks], **arguments)  # type: ignore[arg-type]
    total = result.manifest.statistics.crops
    first, last, end = marks.at["first"], marks.at["last"], marks.at["BuildFinished"]
    return {
        "label_us": 1e6 * (last[1] - first[1]) / (last[2] - first[2]),
        "all_us": 1e6 * (end[1] - began[1]) / total,
        "wall_us": 1e6 * (end[0] - began[0]) / total,
        "plan_s": marks.at["BuildStarted"][0] - began[0],
        "seal_s": end[0] - last[0],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--crops", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.crops)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cheap_teacher.py").write_text(TEACHER)
        (folder / "classes.txt").write_text("".join(f"c{number:03d}\n" for number in range(CLASSES)))
        write_photos(folder / "warm", 200)
        for num_images in arguments.images:
            write_photos(folder / str(num_images), num_images)
        found: dict[int, list[dict[str, float]]] = {num_images: [] for num_images in arguments.images}
        for _ in range(arguments.rounds):
            for num_images in arguments.images:
                command = [sys.executable, __file__, "--measure", str(folder / str(num_images))]
                command += ["--crops", str(arguments.crops)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[num_images].append(json.loads(done.stdout))
    print(f"{'images':>9} " + " ".join(f"{title:>18}" for title in COLUMNS.values()) + f" {'label, ratio':>13}")
    medians = {n: {c: statistics.median(row[c] for row in rows) for c in COLUMNS} for n, rows in found.items()}
    smallest = medians[arguments.images[0]]
    for num_images, row in medians.items():
        cells = " ".join(f"{row[name]:>18.2f}" for name in COLUMNS)
        print(f"{num_images:>9,} {cells} {row['label_us'] / smallest['label_us']:>13.3f}")


if __name__ == "__main__":
    main()
