"""What does a loader of two crop kinds save beside two loaders of one kind each, which decode every image twice?

    python benchmarks/crop_kinds_cost.py [--images 320] [--rounds 5]

Photos are those of loader_speed.py (500 x 375, about 55 KB). Labels come from a made-up teacher with an input of 16
px: 20 global crops (scale 0.25..1, 224 px) and 40 local ones (scale 0.05..0.25, 96 px). Loaders run without workers,
one after the other in each round, and CPU time is measured, so that other processes of the machine count little.

- kinds: `kinds={"global": 2, "local": 6}`
- apart: a loader of 2 global crops, then one of 6 local crops
- one size: 8 crops of 224 px of the global kind, as a loader without kinds gives them
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from loader_speed import write_photos
from torch import Tensor, nn

import ferkd_data as fd

BATCH_IMAGES = 32
KINDS = {"global": 2, "local": 6}


class Teacher(nn.Module):
    """10 classes out of the mean colours of four quarters."""

    preprocessing = {"size": 16, "mean": (0.5,), "std": (0.25,)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(12, 10)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-2, 2, 120).view(10, 12).sin() * 3)
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


def cpu_ms(run: Callable[[], None], num_images: int) -> float:
    begin = time.process_time()
    run()
    return (time.process_time() - begin) * 1000 / num_images


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.modules["crop_kinds_cost"] = sys.modules["__main__"]
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments.images // BATCH_IMAGES * BATCH_IMAGES, arguments.rounds)


def run(folder: Path, num_images: int, rounds: int) -> None:
    write_photos(folder / "photos", num_images)
    kinds = ["global:scale=0.25..1,n=20", "local:scale=0.05..0.25,size=96,n=40"]
    teachers = ["python:crop_kinds_cost:Teacher"]
    fd.build(folder / "photos", folder / "labels", teachers=teachers, crop_kinds=kinds, device="cpu")
    labels = fd.open_labels(folder / "labels")

    def loader(opened: fd.LabelSet, **options: object) -> fd.CropLoader:
        where = {"images": folder / "photos", "cache_dir": folder / "cache", "verify_images": "never"}
        return fd.CropLoader(opened, **where, **options)  # type: ignore[arg-type]

    def alone(kind: str, crops: int) -> fd.CropLoader:
        return loader(labels.crop_kind(kind), batch_size=BATCH_IMAGES * crops, crops_per_image=crops)

    def through(*loaders: fd.CropLoader) -> Callable[[], None]:
        def go() -> None:
            for each in loaders:
                for _ in each:
                    pass

        return go

    ways = {
        "kinds": through(loader(labels, batch_size=BATCH_IMAGES * 2, kinds=KINDS)),
        "apart": through(*(alone(kind, crops) for kind, crops in KINDS.items())),
        "one size": through(alone("global", 8)),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(cpu_ms(way, num_images))
    base = statistics.median(found["kinds"])
    print(f"{num_images} images, {rounds} rounds, medians")
    print(f"{'loader':<10} {'CPU ms/image':>13} {'beside kinds':>13}")
    for name, values in found.items():
        print(f"{name:<10} {statistics.median(values):>13.2f} {statistics.median(values) / base:>13.2f}")


if __name__ == "__main__":
    main()
