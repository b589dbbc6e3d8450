"""First batch, memory of a worker, and a step of small operations beside them: our loader and PyTorch's, side by side.

    python benchmarks/loader_start.py [--workers 2 8] [--batch 64 512] [--rounds 3] [--images 960]

Photos and labels are those of loader_speed.py; PyTorch's DataLoader reads them with torchvision's ImageFolder and
RandomResizedCrop. Each measurement is a process of its own.

- first: seconds from `iter(loader)` to the first batch
- PSS: proportional memory of a worker process while it works, the largest of them, once all are there
- step: microseconds of a small operation in a loop of 2,000 for each batch, beside the loader's workers, and alone
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from loader_speed import image_folder, write_labels, write_photos

import ferkd_data as fd

OPERATIONS = 2000


def pss_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1000


def step() -> float:
    """Seconds of small operations: what a training does that is bound by launching kernels."""
    started, x = time.perf_counter(), torch.ones(4)
    for _ in range(OPERATIONS):
        x = x + 1
    return time.perf_counter() - started


def open_loader(kind: str, folder: Path, workers: int, batch: int) -> Iterable[Any]:
    if kind == "torch":
        os.environ["BATCH"] = str(batch)
        return image_folder(folder / "photos", workers, uint8=True)
    labels = fd.open_labels(folder / "labels")
    settings: dict[str, Any] = {"batch_size": batch, "num_workers": workers, "cache_dir": folder / "cache"}
    return fd.CropLoader(labels, images=folder / "photos", **settings)


def measure(kind: str, folder: Path, workers: int, batch: int) -> dict[str, float]:
    torch.set_num_threads(1)
    alone = min(step() for _ in range(5)) / OPERATIONS * 1e6
    loader = open_loader(kind, folder, workers, batch)
    started = time.perf_counter()
    stream = iter(loader)
    next(stream)
    first, steps, largest = time.perf_counter() - started, [], 0.0
    if isinstance(loader, fd.CropLoader):
        # Until they are ready, this process makes the batches.
        loader._open_workers().wait()
    for _ in range(2):
        for _ in stream:
            steps.append(step() / OPERATIONS * 1e6)
            processes = psutil.Process().children(recursive=True)
            parents = {process.ppid() for process in processes}
            # Those with children are the helper and the template that our workers are forked from.
            largest = max([largest, *(pss_mb(process.pid) for process in processes if process.pid not in parents)])
        stream = iter(loader)
    return {"first": first, "pss": largest, "alone": alone, "step": statistics.median(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, folder, workers, batch = args.measure
        print(json.dumps(measure(kind, Path(folder), int(workers), int(batch))))
        return
    print(f"{'workers':>7} {'batch':>5} {'loader':>6} {'first, s':>9} {'PSS, MB':>8} {'step, us':>9} {'alone, us':>9}")
    with tempfile.TemporaryDirectory() as name:
        write_photos(Path(name) / "photos", args.images)
        write_labels(Path(name) / "photos", Path(name) / "labels")
        for workers in args.workers:
            for batch in args.batch:
                rows: dict[str, list[dict[str, float]]] = {"ours": [], "torch": []}
                for _ in range(args.rounds):
                    for kind, found in rows.items():
                        command = [sys.executable, __file__, "--measure", kind, name, str(workers), str(batch)]
                        environment = os.environ | {"BATCH": str(batch)}
                        run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                        found.append(json.loads(run.stdout))
                medians = {
                    kind: {key: statistics.median(row[key] for row in found) for key in found[0]}
                    for kind, found in rows.items()
                }
                for kind, row in medians.items():
                    print(
                        f"{workers:>7} {batch:>5} {kind:>6} {row['first']:>9.2f} {row['pss']:>8.0f} "
                        f"{row['step']:>9.2f} {row['alone']:>9.2f}",
                        flush=True,
                    )
                ratio = medians["ours"]["first"] / medians["torch"]["first"]
                print(f"{'':>7} {'':>5} {'ratio':>6} {ratio:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
