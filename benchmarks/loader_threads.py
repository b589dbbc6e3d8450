"""Windows made by threads in the training process, threads in one helper process, and forked workers, side by side.

    python benchmarks/loader_threads.py [--number 2] [--rounds 3] [--images 512]

- crops/s: while the training only takes batches
- step: microseconds of a small operation in the training, 2,000 for each batch, for which threads in the same process
  contend with it for the interpreter's lock; alone: without any loading

Each thread has a maker of its own, which opens the label set's files for itself. A helper's threads send images to the
training by PyTorch's shared memory. Free-threaded Python (3.14t) is not measured: it is not available here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from loader_speed import write_labels, write_photos
from loader_start import OPERATIONS, step

import ferkd_data as fd
from ferkd_data.loader.batch_maker import Made
from ferkd_data.loader.schedule import Cursor, Window, windows
from ferkd_data.replay import empty_batch

BATCH, AHEAD = 64, 2


def open_loader(folder: Path, num_workers: int) -> fd.CropLoader:
    labels = fd.open_labels(folder / "labels")
    settings: dict[str, Any] = {"batch_size": BATCH, "num_workers": num_workers, "cache_dir": folder / "cache"}
    return fd.CropLoader(labels, images=folder / "photos", **settings)


def by_threads(folder: Path, number: int, *, shared: bool = False) -> Iterator[torch.Tensor]:
    """Make the windows of epochs without end, `number` at a time, `AHEAD` for each thread."""
    loader = open_loader(folder, 0)
    own = threading.local()

    def make(window: Window) -> tuple[torch.Tensor, Made]:
        if not hasattr(own, "maker"):
            own.maker = loader._maker.alone()
        images = empty_batch(BATCH, 224, shared=shared)
        return images, own.maker.make(window, images)

    waiting: deque[Future[tuple[torch.Tensor, Made]]] = deque()
    with ThreadPoolExecutor(number) as pool:
        for epoch in range(10**6):
            loader._maker.prepare_blocks(epoch)
            for window in windows(loader._shape(epoch), Cursor(epoch=epoch), rank=0, world_size=1):
                waiting.append(pool.submit(make, window))
                if len(waiting) > number * AHEAD:
                    yield waiting.popleft().result()[0]


def _help(folder: Path, number: int, queue: Any) -> None:
    torch.set_num_threads(1)
    for images in by_threads(folder, number, shared=True):
        queue.put(images)


def by_helper(folder: Path, number: int) -> Iterator[torch.Tensor]:
    context = mp.get_context("spawn")
    queue = context.Queue(number * AHEAD)
    process = context.Process(target=_help, args=(folder, number, queue), daemon=True)
    process.start()
    try:
        while True:
            yield queue.get()
    finally:
        process.kill()
        process.join()


def by_workers(folder: Path, number: int) -> Iterator[torch.Tensor]:
    loader = open_loader(folder, number)
    loader._open_workers().wait()
    while True:
        for images, _ in loader:
            yield images


def measure(stream: Iterator[torch.Tensor], batches: int) -> tuple[float, float]:
    """Crops per second, and microseconds of a small operation beside the loading."""
    for _ in range(8):
        next(stream)
    begin = time.perf_counter()
    for _ in range(batches):
        next(stream)
    rate = batches * BATCH / (time.perf_counter() - begin)
    steps = []
    for _ in range(batches):
        next(stream)
        steps.append(step() / OPERATIONS * 1e6)
    stream.close()  # type: ignore[attr-defined]
    return rate, statistics.median(steps)


KINDS = {"threads in this process": by_threads, "threads in one helper": by_helper, "forked workers": by_workers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    alone = []
    with tempfile.TemporaryDirectory() as name:
        write_photos(Path(name) / "photos", args.images)
        write_labels(Path(name) / "photos", Path(name) / "labels")
        for _ in range(args.rounds):
            alone.append(min(step() for _ in range(5)) / OPERATIONS * 1e6)
            for kind, open_stream in KINDS.items():
                rows[kind].append(measure(open_stream(Path(name), args.number), 20))
    reference = statistics.median(rate for rate, _ in rows["forked workers"])
    print(f"load {os.getloadavg()[0]:.0f}; a small operation alone: {statistics.median(alone):.1f} us")
    for kind, found in rows.items():
        rate, beside = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{kind:<24} {rate:>7.0f} crops/s  {rate / reference:>5.2f} of forked workers  step {beside:>6.1f} us")


if __name__ == "__main__":
    main()
