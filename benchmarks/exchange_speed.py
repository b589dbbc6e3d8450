"""How fast label sets are verified and streamed: side by side with hashing and with local reading, in one run.

    python benchmarks/exchange_speed.py [--images 4000] [--crops 50] [--shards 16] [--workers 0] [--runs 5]
        [--verify-images 4096] [--verify-crops 200]

verify: MB/s of the shard files, beside SHA-256 of the same files (same threads), reading them from the disk, and, in
layout parquet, hashing and decoding them with nothing checked; on labels made up, with real JPEGs in the tars. CPU time
beside it, since others may be busy on the machine.
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
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from synthetic import count_statistics, random_labels, write_label_set

import ferkd_data as fd
from ferkd_data.labels.rows import ImageLabels
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


def on_all_cores(work: Callable[[Path], object], files: list[Path]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        list(executor.map(work, files))


def read(file: Path) -> None:
    buffer = bytearray(2**20)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def forget(files: list[Path]) -> None:
    """Out of the page cache, where the system knows how."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def decode(file: Path) -> None:
    """All columns of a block file as arrays, with nothing checked: the least that verifying it can cost."""
    table = pq.ParquetFile(file).read(use_threads=False)
    for column in table.columns:
        flat = column.combine_chunks()
        flat = flat.flatten() if pa.types.is_fixed_size_list(flat.type) else flat
        if not pa.types.is_string(flat.type) and not pa.types.is_fixed_size_binary(flat.type):
            flat.to_numpy(zero_copy_only=False)


def hash_and_decode(file: Path) -> None:
    sha256_file(file)
    decode(file)


def photo_bytes(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:64]]


def made_up_labels(out: Path, layout: str, encoded: list[bytes], arguments: argparse.Namespace) -> None:
    images, shards, crops = arguments.verify_images, 1 if layout == "parquet" else 4, arguments.verify_crops

    def rows(shard: int) -> Iterator[tuple[ImageLabels, bytes]]:
        generator = np.random.default_rng(shard)
        for number in range(images // shards):
            image = encoded[number % len(encoded)]
            key = f"n{number % 1000:08d}/n{number % 1000:08d}_{shard}{number:06d}"
            yield random_labels(key, generator, num_crops=crops, top_k=5, num_classes=1000, image=image), image

    per_block = 50 if layout == "parquet" else crops
    write_label_set(
        out,
        map(rows, range(shards)),
        num_crops=crops,
        top_k=5,
        num_classes=1000,
        layout=layout,
        crops_per_block=per_block,
    )
    count_statistics(out)


def bench_verify(labels: Path) -> None:
    """All of them in turn, on all cores; `cold` from a page cache that was told to forget the files."""
    files = sorted(labels.glob("labels/*.parquet")) + sorted(labels.glob("shards/*.tar"))
    size = sum(path.stat().st_size for path in files) / 1e6
    works: dict[str, Callable[[], object]] = {
        "reading, cold": lambda: on_all_cores(read, files),
        "verify, cold": lambda: fd.verify(labels),
        "SHA-256": lambda: on_all_cores(sha256_file, files),
        "verify": lambda: fd.verify(labels),
    }
    if files[0].suffix == ".parquet":
        works["decoding"] = lambda: on_all_cores(decode, files)
        works["SHA-256 and decoding"] = lambda: on_all_cores(hash_and_decode, files)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(RUNS):
        for name, work in works.items():
            if name.endswith("cold"):
                forget(files)
            start, cpu = time.perf_counter(), time.process_time()
            work()
            times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    rates = {name: size / statistics.median(wall for wall, _ in values) for name, values in times.items()}
    cpu_seconds = {name: statistics.median(cpu for _, cpu in values) for name, values in times.items()}
    for name, rate in rates.items():
        print(f"  {name:<20} {rate:>9,.1f} MB/s, {1000 * cpu_seconds[name] / size:>7,.2f} ms of CPU time for each MB")
    print(f"  verify / SHA-256: {rates['verify'] / rates['SHA-256']:.2f}", end="")
    print(f", of CPU time {cpu_seconds['SHA-256'] / cpu_seconds['verify']:.2f}")
    print(f"  verify, cold / reading, cold: {rates['verify, cold'] / rates['reading, cold']:.2f}")
    floor = "SHA-256 and decoding"
    if floor in rates:
        print(f"  {floor} / SHA-256: {rates[floor] / rates['SHA-256']:.2f}", end="")
        print(f", of CPU time {cpu_seconds['SHA-256'] / cpu_seconds[floor]:.2f}: all that can be had")
        print(f"  verify / {floor}: {rates['verify'] / rates[floor]:.2f}", end="")
        print(f", of CPU time {cpu_seconds[floor] / cpu_seconds['verify']:.2f}")


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
    parser.add_argument("--verify-images", type=int, default=4096)
    parser.add_argument("--verify-crops", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--runs", type=int, default=RUNS, help="of the loader")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        photos(scratch / "photos", arguments.images)
        (scratch / "bench_teacher.py").write_text(TEACHER)
        sys.path.insert(0, str(scratch))
        for layout in ("parquet", "webdataset"):
            made_up_labels(scratch / f"made-up-{layout}", layout, photo_bytes(scratch / "photos"), arguments)
            crops = f"{arguments.verify_images} images x {arguments.verify_crops} crops"
            print(f"verify: layout {layout}, {crops}, {os.cpu_count()} cores")
            bench_verify(scratch / f"made-up-{layout}")
            shutil.rmtree(scratch / f"made-up-{layout}")
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
        for layout, order in (("parquet", "global"), ("parquet", "shards"), ("webdataset", "shards")):
            images = scratch / "photos" if layout == "parquet" else None
            print(f"loader on the {layout} set, order {order}, {arguments.workers} workers, M=4, 224 px")
            cache = scratch / f"{layout}-{order}"
            cache.mkdir()
            bench_streaming(scratch / layout, images, cache, order, arguments.workers, arguments.runs)


if __name__ == "__main__":
    main()
