"""Time the reader of plain tars against reading a tar member by member.

    python benchmarks/plain_tars.py [--images 2048] [--rounds 5]

Reads the rows of one shard of made-up labels (50 crops, top-5) with JPEGs of 98 kB, from the page cache, in turn by
`ferkd_data.format.plain_tar` and as any other tar; then `fd.verify` with both. Prints CPU seconds (medians) and ratios.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image
from synthetic import count_statistics, random_labels, write_label_set

import ferkd_data as fd

SHAPE = {"num_crops": 50, "top_k": 5, "num_classes": 1000}


def cpu_seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def compare(what: str, action: Callable[[], object], rounds: int) -> None:
    plain, members = [], []
    for _ in range(rounds):
        plain.append(cpu_seconds(action))
        with patch("ferkd_data.format.plain_tar.read_labels", return_value=None):
            members.append(cpu_seconds(action))
    a, b = statistics.median(plain), statistics.median(members)
    print(f"{what:<12} {1000 * a:8.1f} ms {1000 * b:8.1f} ms   ratio {b / a:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    picture = io.BytesIO()
    Image.effect_noise((500, 375), 60).convert("RGB").save(picture, "JPEG")
    image, draw = picture.getvalue(), np.random.default_rng(0)
    keys = [f"class{n % 1000:04d}/image{n:08d}" for n in range(options.images)]
    rows = [(random_labels(key, draw, image=image, **SHAPE), image) for key in keys]
    print(f"{options.images} images with {len(image):,} bytes each: plain, member by member")
    with tempfile.TemporaryDirectory() as folder:
        write_label_set(Path(folder), [rows], layout="webdataset", **SHAPE)
        count_statistics(Path(folder))
        labels = fd.open_labels(folder)
        compare("rows", lambda: labels.raw_block(0, 0), options.rounds)
        compare("fd.verify", lambda: fd.verify(folder, threads=1), options.rounds)


if __name__ == "__main__":
    main()
