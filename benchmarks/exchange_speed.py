"""How fast label sets are verified and streamed: side by side with hashing and with local reading, in one run.

    python benchmarks/exchange_speed.py [--images 4000] [--crops 50] [--shards 16] [--workers 0] [--runs 5]

verify: MB/s of the shard files, beside SHA-256 of the same files (same threads) and plain reading.
streaming: crops/s of a CropLoader over one epoch, from making it to its last batch, on a label set from an HTTP server
on this host (a process of its own: nginx, or Python's where there is none), with an empty cache (cold) and a filled one
(warm), beside the same loader on the folder, with its cache filled; and seconds to the first batch. Global order needs
the whole crop block before the first batch; order "shards" reads on as it goes.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

import ferkd_data as fd
from ferkd_data.storage import sha256_file

RUNS = 5
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

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


@contextmanager
def serve(folder: Path, scratch: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if NGINX:
        paths = " ".join(
            f"{name}_temp_path {scratch};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        place = f"listen 127.0.0.1:{port}; root {folder};"
        (scratch / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {scratch}/nginx.pid; error_log {scratch}/nginx.log; events {{}}"
            f"http {{ access_log off; sendfile on; {paths} server {{ {place} }} }}"
        )
        command = [NGINX, "-c", str(scratch / "nginx.conf")]
    else:
        command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def one_epoch(place: str | Path, cache: Path, images: Path | None, order: str, workers: int) -> tuple[float, float]:
    """Seconds to the first batch and to the last."""
    start = time.perf_counter()
    labels = fd.open_labels(place, cache_dir=cache)
    loader = fd.CropLoader(
        labels,
        images=images,
        batch_size=256,
        crops_per_image=4,
        order=order,
        shards_together=2,
        num_workers=workers,
        cache_dir=cache,
    )
    first = 0.0
    for _ in loader:
        first = first or time.perf_counter() - start
    return first, time.perf_counter() - start


def bench_streaming(labels: Path, images: Path | None, scratch: Path, order: str, workers: int, runs: int) -> None:
    crops = 4 * len(fd.open_labels(labels))
    rates: dict[str, list[float]] = {}
    firsts: dict[str, list[float]] = {}
    with serve(labels, scratch) as url:
        one_epoch(labels, scratch / "folder", images, order, workers)
        for _ in range(runs):
            shutil.rmtree(scratch / "http", ignore_errors=True)
            for name, place in (("folder, warm", labels), ("http, cold", url), ("http, warm", url)):
                first, whole = one_epoch(place, scratch / name.split(",")[0], images, order, workers)
                rates.setdefault(name, []).append(crops / whole)
                firsts.setdefault(name, []).append(first)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"  {name:<13} {rate:>8,.0f} crops/s, first batch after {statistics.median(firsts[name]):.2f} s")
    print(f"  warm: http / folder {medians['http, warm'] / medians['folder, warm']:.3f}")
    print(f"  cold: http / folder {medians['http, cold'] / medians['folder, warm']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--crops", type=int, default=50)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--runs", type=int, default=RUNS, help="of the loader")
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
                images_per_shard=-(-arguments.images // arguments.shards),
            )
            print(f"layout {layout}, {arguments.images} images x {arguments.crops} crops, {os.cpu_count()} cores")
            bench_verify(scratch / layout)
        for layout, order in (("parquet", "global"), ("parquet", "shards"), ("webdataset", "shards")):
            images = scratch / "photos" if layout == "parquet" else None
            print(f"loader on the {layout} set, order {order}, {arguments.workers} workers, M=4, 224 px")
            cache = scratch / f"{layout}-{order}"
            cache.mkdir()
            bench_streaming(scratch / layout, images, cache, order, arguments.workers, arguments.runs)


if __name__ == "__main__":
    main()
