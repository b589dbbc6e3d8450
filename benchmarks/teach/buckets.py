"""Count how often the teachers are right on the crops of each bucket: does a label set know which of its crops are bad?

    python benchmarks/teach/buckets.py LABELS

Then what each way of making targets does about it: the crops in use, how often the largest class of the target is the
ground truth, and its mean weight in the target. No training and no images: it reads the stored labels. Prints Markdown.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent))

from methods import METHODS

import ferkd_data as fd
from ferkd_data import calibration

BUCKETS = ("extreme_hard", "moderate_hard", "hard_positive", "easy_positive")
EDGES = (0.0, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Crops of known ground truth, arrays (N,)."""

    bucket: npt.NDArray[np.uint8]
    p_max: npt.NDArray[np.float32]
    target_prob: npt.NDArray[np.float32]
    right: npt.NDArray[np.bool_]
    among_k: npt.NDArray[np.bool_]
    """Whether the ground truth is among the classes stored."""


def read(location: str) -> Crops:
    images = [image for image in fd.open_labels(location) if image.target is not None]
    hits = np.concatenate([image.class_index == image.target for image in images])
    return Crops(
        bucket=np.concatenate([image.bucket for image in images]),
        p_max=np.concatenate([image.class_prob[:, 0] for image in images]).astype(np.float32),
        target_prob=np.concatenate([image.target_prob for image in images]).astype(np.float32),
        right=hits[:, 0],
        among_k=hits.any(axis=1),
    )


def row(name: str, crops: Crops, rows: npt.NDArray[np.bool_]) -> str:
    if not rows.any():
        return f"| {name} | 0 | 0.0 | | | | |"
    numbers = [
        100 * rows.mean(),
        100 * crops.right[rows].mean(),
        100 * crops.among_k[rows].mean(),
        100 * crops.p_max[rows].mean(),
        100 * crops.target_prob[rows].mean(),
    ]
    return f"| {name} | {rows.sum():,} | {' | '.join(f'{number:.1f}' for number in numbers)} |"


WAYS = (
    "hard fkd ferkd all-blend soften discard ferkd/blend ferkd/wrong-soften ferkd/wrong-blend ferkd/on-target "
    "ferkd/mid-0.5 ferkd/mid-0.7"
).split()


def targets_of(labels: fd.LabelSet, how: fd.Calibration) -> Iterator[tuple[npt.NDArray[np.bool_], ...]]:
    """Make each image's targets: which crops (N,) are in use, whether the ground truth leads, and its weight."""
    for image in labels:
        if image.target is None:
            continue
        bucket = calibration.crop_buckets(how, image.bucket, image.class_prob, image.target_prob)
        truth = np.full(len(bucket), image.target)
        codes = calibration.crop_policies(how, bucket, image.class_index[:, 0], truth)
        targets = calibration.calibrate(
            how,
            class_index=image.class_index,
            class_prob=image.class_prob,
            codes=codes,
            target=truth,
            num_classes=labels.num_classes,
        )
        dense = targets.dense().numpy()
        use = calibration.use_probability(how, codes) > 0
        yield use, dense.argmax(axis=1) == truth, dense[np.arange(len(truth)), truth]


def ways(location: str) -> None:
    """Print what the methods make of the crops."""
    labels = fd.open_labels(location)
    print("| targets | crops in use % | ground truth is the largest % | its mean weight % |\n| --- | --- | --- | --- |")
    for name in WAYS:
        use, leads, weight = map(np.concatenate, zip(*targets_of(labels, METHODS[name].calibration), strict=True))
        numbers = 100 * use.mean(), 100 * leads[use].mean(), 100 * weight[use].mean()
        print(f"| {name} | {' | '.join(f'{number:.1f}' for number in numbers)} |")


def main() -> None:
    crops = read(sys.argv[1])
    head = "crops | share % | right % | ground truth stored % | mean p_max % | mean probability of the ground truth %"
    for title, parts in (
        ("bucket", {name: crops.bucket == code for code, name in enumerate(BUCKETS)}),
        (
            "p_max",
            {
                f"{low:g} to {high:g}": (crops.p_max >= low) & ((crops.p_max < high) | (high == 1))
                for low, high in itertools.pairwise(EDGES)
            },
        ),
    ):
        print(f"| {title} | {head} |\n{'| --- ' * 7}|")
        for name, rows in parts.items():
            print(row(name, crops, rows))
        print(row("all", crops, np.ones_like(crops.right)) + "\n")
    ways(sys.argv[1])


if __name__ == "__main__":
    main()
