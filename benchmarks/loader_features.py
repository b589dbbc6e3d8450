"""What a loader's options cost in CPU time per crop, side by side: ground truth, keys, class maps, transform=.

    python benchmarks/loader_features.py [--images 640] [--rounds 5]

Photos and made-up labels of 1,000 classes are those of loader_speed.py. All loaders run without workers, in this
process, one after the other in each round, so that CPU time is all of the work there is and other processes of the
machine count little.

- bare: images and targets as they are
- keys: keys=True
- 100 of 1,000 classes: a class map that picks 100 classes, and keeps all images
- 1,000 into 100, unevenly: groups of 1 to 19 classes, so that a target has an entry for nearly each of the 100
- select half: every second image of the label set, at random
- transform, identity: what seeding the generators and calling the function costs
- transform, v2: ColorJitter and RandomErasing of torchvision
- v2 alone: the same transform on crops that are there already, nothing seeded, no loader
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from loader_speed import write_labels, write_photos
from torch import Tensor
from torchvision.transforms import v2

import ferkd_data as fd

BATCH = 64


def unchanged(crop: Tensor) -> Tensor:
    return crop


def uneven_groups() -> list[int]:
    """1,000 classes in 100 groups of 1 to 19."""
    rng = np.random.default_rng(0)
    sizes = np.repeat(np.arange(1, 20), 6)[:100]
    sizes = rng.permutation(sizes)
    sizes[-1] += 1000 - sizes.sum()
    return np.repeat(np.arange(100), sizes).tolist()


def cpu_ms(run: Callable[[], int]) -> float:
    """CPU milliseconds per crop; `run` returns the crops it made."""
    begin = time.process_time()
    crops = run()
    return (time.process_time() - begin) * 1000 / crops


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments.images, arguments.rounds)


def run(folder: Path, num_images: int, rounds: int) -> None:
    photos = folder / "photos"
    write_photos(photos, num_images)
    write_labels(photos, folder / "labels")
    labels = fd.open_labels(folder / "labels")
    jitter = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomErasing(p=0.25)])

    def loader(opened: fd.LabelSet = labels, **options: object) -> Callable[[], int]:
        made = fd.CropLoader(
            opened, images=photos, batch_size=BATCH, verify_images="never", cache_dir=folder / "cache", **options
        )
        return lambda: sum(len(targets) for _, targets in made)

    crops = next(iter(fd.CropLoader(labels, images=photos, batch_size=BATCH, cache_dir=folder / "cache")))[0].clone()

    def alone() -> int:
        for _ in range(num_images * 4 // BATCH):
            for b in range(BATCH):
                jitter(crops[b])
        return num_images * 4 // BATCH * BATCH

    half = np.random.default_rng(0).permutation(num_images)[: num_images // 2]
    candidates = {
        "bare": loader(),
        "keys": loader(keys=True),
        "100 of 1,000 classes": loader(labels.map_classes({c: c for c in range(100)}, keep_images=True)),
        "1,000 into 100, unevenly": loader(labels.map_classes(uneven_groups())),
        "select half": loader(labels.select(rows=half)),
        "transform, identity": loader(transform=unchanged),
        "transform, v2": loader(transform=jitter),
        "v2 alone": alone,
    }
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()  # Unpacks labels, and reads the files once.
    for _ in range(rounds):
        for name, candidate in candidates.items():
            found[name].append(cpu_ms(candidate))
    print(f"\nbatch {BATCH}, 4 crops an image, 224 px, no workers, median of {rounds} rounds\n")
    print(f"{'loader':28}{'CPU ms a crop':>14}{'times bare':>12}")
    bare = statistics.median(found["bare"])
    for name, values in found.items():
        median = statistics.median(values)
        print(f"{name:28}{median:>14.3f}{median / bare:>11.2f}x")


if __name__ == "__main__":
    main()
