"""What do recorded operations cost beside cutting the crop that they change?

    python benchmarks/augment_cost.py

One thread; medians over rounds in which all candidates take turns; noise of 500 x 375 cut to 224 px, 8 crops at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torchvision.transforms import v2

from ferkd_data.augment import OPERATIONS, Operations, apply_operations, draw_operations, parse_augmentations
from ferkd_data.crops import CropDistribution, draw_crops
from ferkd_data.replay import replay

CROPS, SIDE, ROUNDS = 8, 224, 15
THEIRS = {
    "RandAugment(2, 9)": v2.RandAugment(2, 9),
    "TrivialAugmentWide()": v2.TrivialAugmentWide(),
    "ColorJitter(0.4, 0.4, 0.4, 0.1)": v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
}
MIXES = ("randaugment:n=2,m=9", "trivialaugment", "colorjitter", "erase:p=0.25")


def candidates() -> dict[str, Callable[[], object]]:
    image = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    crops = draw_crops("a", 375, 500, seed=0, count=CROPS, distribution=CropDistribution())
    batch = replay(image, crops, size=SIDE)
    found: dict[str, Callable[[], object]] = {"cutting": lambda: replay(image, crops, size=SIDE)}
    for one in OPERATIONS:
        value = min(one.values[1], {"blur": 45, "posterize": 4}.get(one.name, 1200))
        recorded = Operations(
            codes=np.full((CROPS, 1), one.code, np.uint8),
            values=np.full((CROPS, 1), value, np.int16),
            erase=np.zeros((CROPS, 4), np.uint16),
        )
        found[one.name] = lambda recorded=recorded: apply_operations(batch.clone(), recorded)  # type: ignore[misc]
    for text in MIXES:
        drawn = draw_operations("a", parse_augmentations([text]), seed=0, first=0, count=CROPS)
        found[text] = lambda drawn=drawn: apply_operations(batch.clone(), drawn)  # type: ignore[misc]
    for name, theirs in THEIRS.items():
        found[f"torchvision's {name}"] = lambda theirs=theirs: [theirs(crop) for crop in batch]  # type: ignore[misc]
    return found


def main() -> None:
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, work in candidates().items():
            started = time.process_time()
            work()
            times.setdefault(name, []).append(1e3 * (time.process_time() - started) / CROPS)
    cutting = median(times["cutting"])
    print("| | ms of CPU a crop | against cutting |\n| --- | ---: | ---: |")
    for name, each in times.items():
        print(f"| {name} | {median(each):.3f} | {median(each) / cutting:.2f} |")


if __name__ == "__main__":
    main()
