"""Count how often the teachers are right on the crops of each bucket: does a label set know which of its crops are bad?

    python benchmarks/teach/buckets.py LABELS

No training and no images: it reads the stored labels. Prints Markdown.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import ferkd_data as fd

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


if __name__ == "__main__":
    main()
