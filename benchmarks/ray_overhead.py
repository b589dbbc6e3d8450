"""What Ray costs: crops/s of the same build by N actors of a Ray on this machine, and by N worker processes without it.

    python benchmarks/ray_overhead.py [--workers 2] [--crops 200] [--rounds 5]

The teacher is the demo's EfficientNet-Lite0 (ONNX), the images its 20 photos, two in a shard. The two engines take
turns, each build is a process of its own. A rate is taken from the moment that every worker has answered
once to the last answer of all: the start of Ray and of the workers, and the loading of teachers, are not in it. Actors
report once a second, so let a build take a minute or more. Prints the medians, and the median over the rounds of Ray's
rate by the other's.
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

from ferkd_data.demo import Demo, write_demo

ENGINES = ("local", "ray")
BUILD = """
import json, sys
import ferkd_data as fd
from time import perf_counter
settings = json.loads(sys.argv[1])
marks = []

def report(progress):
    if sum(worker.crops_per_second > 0 for worker in progress.workers) == settings["workers"]:
        marks.append((perf_counter(), progress.crops_done))

if __name__ == "__main__":
    fd.build(on_progress=report, **settings)
    (start, before), (end, after) = marks[0], marks[-1]
    print((after - before) / (end - start), end - start)
"""


def rate(engine: str, demo: Demo, arguments: argparse.Namespace) -> tuple[float, float]:
    """Crops per second, and the seconds that they were counted for."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "build_once.py"
        script.write_text(BUILD)
        settings = {
            "source": str(demo.photos),
            "out": str(Path(folder) / "out"),
            "teachers": [demo.teachers[0]],
            "classes": str(demo.classes),
            "crops": arguments.crops,
            "images_per_shard": 2,
            "workers": arguments.workers,
            "device": "cpu",
            "engine": engine,
            "threads": 1,
        }
        done = subprocess.run(
            [sys.executable, str(script), json.dumps(settings)], capture_output=True, text=True, check=True
        )
        per_second, seconds = map(float, done.stdout.split())
        return per_second, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--crops", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--demo", type=Path, help="A folder that `ferkd-data demo` wrote.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        demo = write_demo((arguments.demo or Path(name)).absolute())
        rates: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        for number in range(arguments.rounds):
            for engine in ENGINES if number % 2 == 0 else reversed(ENGINES):
                per_second, seconds = rate(engine, demo, arguments)
                rates[engine].append(per_second)
                print(f"round {number + 1}, {engine:<5} {per_second:>8.1f} crops/s over {seconds:.0f} s", flush=True)
    print(f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {arguments.workers} workers of one thread, medians:")
    for engine, values in rates.items():
        print(f"  {engine:<6} {statistics.median(values):>8.1f} crops/s")
    ratio = statistics.median(ray / local for local, ray in zip(rates["local"], rates["ray"], strict=True))
    print(f"  ray / local {ratio:.3f}, an overhead of {1 - ratio:.1%}")


if __name__ == "__main__":
    main()
