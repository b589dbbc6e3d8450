"""What several worker processes on one machine's CPU bring: crops/s of the same build by 1 process and by N.

    python benchmarks/build_processes.py --teacher SPEC --images FOLDER --classes FILE [--processes 2] [--crops 50]

One process computes with one thread here, as each of N does; one process with all cores, the default, is shown too.
Each build starts anew; the median of three rounds, the three kinds taking turns.
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
from pathlib import Path

ROUNDS = 3
BUILD = """
import json, sys, torch
threads = int(sys.argv[1])
import ferkd_data as fd
from time import perf_counter
if threads:
    torch.set_num_threads(threads)
marks = []

def report(progress):
    marks.append((perf_counter(), progress.crops_done))

if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    result = fd.build(on_progress=report, **settings)
    # From the first answers on: loading teachers is no part of the rate.
    (start, before), (end, after) = marks[0], marks[-1]
    print((after - before) / (end - start))
"""


def rate(threads: int, processes: int, arguments: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "build_once.py"
        script.write_text(BUILD)
        settings = {
            "source": arguments.images,
            "out": str(Path(folder) / "out"),
            "teachers": arguments.teacher,
            "classes": arguments.classes,
            "crops": arguments.crops,
            "images_per_shard": 5,
            "processes": processes,
            "device": "cpu",
            "workers": processes,
        }
        done = subprocess.run(
            [sys.executable, str(script), str(threads), json.dumps(settings)],
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--classes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--crops", type=int, default=50)
    arguments = parser.parse_args()
    kinds = {
        "1 process, 1 thread": (1, 1),
        f"1 process, {os.cpu_count()} threads": (0, 1),
        f"{arguments.processes} processes": (0, arguments.processes),
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, (threads, processes) in kinds.items():
            rates[name].append(rate(threads, processes, arguments))
    first = statistics.median(next(iter(rates.values())))
    started = time.strftime("%Y-%m-%d")
    print(f"{started}, {os.cpu_count()} cores, {len(arguments.teacher)} teachers, {arguments.crops} crops per image")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"  {name:<22} {median:>8.1f} crops/s   {median / first:.2f}x")


if __name__ == "__main__":
    main()
