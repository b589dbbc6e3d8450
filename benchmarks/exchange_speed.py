"""How fast label sets are verified and streamed: side by side with hashing and with local reading, in one run.

    python benchmarks/exchange_speed.py [--images 2000] [--crops 50]

verify: MB/s of the shard files, beside SHA-256 of the same files (same threads) and plain reading.
streaming: crops/s of a CropLoader on a label set from an HTTP server on this host, with an empty (cold) and a filled
cache (warm), beside the same loader on the folder.
"""

from __future__ import annotations

import argparse
import http.server
import io
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import ferkd_data as fd
from ferkd_data.storage import sha256_file

RUNS = 5


TEACHER = """
import torch

def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 1000))
"""


def photos(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    base = generator.integers(0, 256, (24, 32, 3), np.uint8)
    for number in range(count):
        picture = Image.fromarray(np.roll(base, number, axis=1)).resize((500, 375), Image.Resampling.BICUBIC)
        noise = generator.normal(0, 12, (375, 500, 1))
        picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        path = folder / f"class{number % 10}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())


def median_seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def hash_all(files: list[Path]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        list(executor.map(sha256_file, files))


def read_all(files: list[Path]) -> None:
    for file in files:
        file.read_bytes()


def bench_verify(labels: Path) -> None:
    files = [path for path in labels.rglob("*") if path.suffix in (".parquet", ".tar")]
    size = sum(path.stat().st_size for path in files) / 1e6
    rates = {
        "reading": size / median_seconds(lambda: read_all(files)),
        "SHA-256": size / median_seconds(lambda: hash_all(files)),
        "verify": size / median_seconds(lambda: fd.verify(labels)),
    }
    for name, rate in rates.items():
        print(f"  {name:<8} {rate:>9,.1f} MB/s")
    print(f"  verify / the slower of the others: {rates['verify'] / min(rates['reading'], rates['SHA-256']):.2f}")


class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass


def bench_streaming(labels: Path, images: Path, scratch: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(labels)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"

    def epoch(place: str | Path, cache: Path, fresh: bool) -> None:
        if fresh:
            shutil.rmtree(cache, ignore_errors=True)
        opened = fd.open_labels(place, cache_dir=cache)
        loader = fd.CropLoader(opened, images=images, batch_size=256, crops_per_image=4, cache_dir=cache)
        for _ in loader:
            pass

    crops = 4 * len(fd.open_labels(labels))
    rates: dict[str, list[float]] = {}
    for _ in range(RUNS):
        for name, place, fresh in (
            ("folder, cold", labels, True),
            ("folder, warm", labels, False),
            ("http, cold", url, True),
            ("http, warm", url, False),
        ):
            start = time.perf_counter()
            epoch(place, scratch / name.split(",")[0], fresh)
            rates.setdefault(name, []).append(crops / (time.perf_counter() - start))
    server.shutdown()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"  {name:<13} {rate:>8,.0f} crops/s")
    print(f"  warm: http / folder {medians['http, warm'] / medians['folder, warm']:.3f}")
    print(f"  cold: http / folder warm {medians['http, cold'] / medians['folder, warm']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--crops", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        photos(scratch / "photos", arguments.images)
        (scratch / "bench_teacher.py").write_text(TEACHER)
        sys.path.insert(0, str(scratch))
        classes = scratch / "classes.txt"
        classes.write_text("".join(f"class{i}\n" for i in range(1000)))
        for layout in ("parquet", "webdataset"):
            fd.build(
                scratch / "photos",
                scratch / layout,
                teachers=["python:bench_teacher:small?size=32&mean=0.5,0.5,0.5&std=0.5,0.5,0.5"],
                crops=arguments.crops,
                layout=layout,
                classes=classes,
                images_per_shard=500,
            )
            print(f"layout {layout}, {arguments.images} images x {arguments.crops} crops, {os.cpu_count()} cores")
            bench_verify(scratch / layout)
        print("loader on the parquet set, no workers, M=4, 224 px")
        bench_streaming(scratch / "parquet", scratch / "photos", scratch / "cache")


if __name__ == "__main__":
    main()
