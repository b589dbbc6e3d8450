"""Does the loader's memory, or the time to its first batch, grow with the data set or the place in the epoch?

    python benchmarks/loader_growth.py [--images 10000 100000 1000000]

Real label shards and real tars of 32-pixel JPEGs, all alike but for their keys. Each size runs in a process of its own,
two workers, global shuffle. Memory is what a process has for itself (private), not the files that it maps.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from synthetic import write_label_set

import ferkd_data as fd
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.storage import image_digest

CROPS, TOP_K, CLASSES, SHARD, SIDE = 4, 2, 1000, 4096, 32
COLUMNS = {
    "open_s": "open, s",
    "first_s": "first batch, s",
    "second_s": "1st batch, epoch 2, s",
    "resume_s": "resume at 90 %, s",
    "main_mb": "MB, main",
    "worker_mb": "MB, worker",
    "cache_mb": "MB, cache on disk",
}


def write_data(folder: Path, num_images: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    crop = {
        "boxes": np.full((CROPS, 4), SIDE // 4, np.uint16),
        "flip": np.zeros(CROPS, np.bool_),
        "class_index": np.arange(CROPS * TOP_K, dtype=np.uint16).reshape(CROPS, TOP_K),
        "class_prob": np.full((CROPS, TOP_K), 0.4, np.float16),
        "target_prob": np.full(CROPS, 0.4, np.float16),
        "bucket": np.full(CROPS, 2, np.uint8),
    }
    common = {"image_digest": image_digest(data), "height": SIDE, "width": SIDE, "target": 1, **crop}

    def shards() -> Iterator[Iterator[tuple[ImageLabels, bytes]]]:
        for start in range(0, num_images, SHARD):
            numbers = range(start, min(start + SHARD, num_images))
            with tarfile.open(folder / f"{start:09d}.tar", "w") as tar:
                for number in numbers:
                    member = tarfile.TarInfo(f"{number:09d}.jpg")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            yield ((ImageLabels(key=f"{number:09d}", **common), b"") for number in numbers)

    write_label_set(folder / "labels", shards(), num_crops=CROPS, top_k=TOP_K, num_classes=CLASSES)


def private_mb(pid: int | str) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1000


def measure(folder: Path) -> dict[str, float]:
    labels = fd.open_labels(folder / "labels")
    found: dict[str, float] = {}

    def loader() -> fd.CropLoader:
        return fd.CropLoader(
            labels,
            images=str(folder / "*.tar"),
            batch_size=64,
            crops_per_image=2,
            size=SIDE,
            num_workers=2,
            cache_dir=folder / "cache",
        )

    started = time.perf_counter()
    first = loader()
    found["open_s"] = time.perf_counter() - started
    started = time.perf_counter()
    next(iter(first))
    found["first_s"] = time.perf_counter() - started
    first.set_epoch(1)
    started = time.perf_counter()
    for _ in itertools.islice(first, 1):
        pass
    found["second_s"] = time.perf_counter() - started
    for _ in itertools.islice(first, 200):
        pass
    found["main_mb"] = private_mb("self")
    found["worker_mb"] = max(private_mb(str(child.pid)) for child in psutil.Process().children(recursive=True))
    state = first.state_dict()
    state["place"] |= {"epoch": 1, "images": len(labels) * 9 // 10 // 32 * 32}
    del first
    late = loader()
    late.load_state_dict(state)
    started = time.perf_counter()
    next(iter(late))
    found["resume_s"] = time.perf_counter() - started
    found["cache_mb"] = sum(path.stat().st_size for path in (folder / "cache").rglob("*.npy")) / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    print(f"{'images':>9} " + " ".join(f"{title:>22}" for title in COLUMNS.values()))
    for num_images in args.images:
        with tempfile.TemporaryDirectory() as name:
            write_data(Path(name), num_images)
            command = [sys.executable, __file__, "--measure", name]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{num_images:>9,} " + " ".join(f"{found[column]:>22.2f}" for column in COLUMNS))


if __name__ == "__main__":
    main()
