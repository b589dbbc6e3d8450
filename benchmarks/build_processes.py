"""What several worker processes on one machine's CPU bring: crops/s of the same build by one worker and by N.

    python benchmarks/build_processes.py --teacher SPEC --images FOLDER --classes FILE [--workers 2] [--crops 50]

A worker is what runs on one core: the single one is kept on the first core, where it decodes, cuts and computes with
one thread, as each of N does on N cores. One process on all those cores, the default of `build`, is shown as well.

The ceiling of the machine comes from a control in the same rounds: the bare teacher on one core alone, and N of them at
once, each on its own core. What N builders lose against N times one builder, but bare teachers lose too, is not ours.

Each build starts anew. Its rate is taken between the first tenth of its crops and the last, so that neither the start
of the workers nor the uneven end counts; both are seconds, whatever the size of a build. Rounds in which the kinds take
turns, medians. The CPU time per crop beside it shows what a busy machine hides: N workers that cost no more of it than
one have lost nothing of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CONTROL_SECONDS = 8.0
BUILD = """
import json, multiprocessing, os, sys
os.sched_setaffinity(0, json.loads(sys.argv[1]))
import ferkd_data as fd
from pathlib import Path
from time import perf_counter, process_time
marks = []

def cpu_seconds():
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return process_time() + ticks / os.sysconf("SC_CLK_TCK")

def report(progress):
    marks.append((progress.crops_done, perf_counter(), cpu_seconds()))

if __name__ == "__main__":
    result = fd.build(on_progress=report, **json.loads(sys.argv[2]))
    total = marks[-1][0]
    first = next(mark for mark in marks if mark[0] >= 0.1 * total)
    last = next(mark for mark in marks if mark[0] >= 0.9 * total)
    crops, seconds, cpu = (b - a for a, b in zip(first, last))
    print(crops / seconds, cpu / crops * 1000)
"""
CONTROL = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
import torch
from ferkd_data.builder import Resources
from ferkd_data.replay import empty_batch
from ferkd_data.teachers import load_teachers
from time import perf_counter, process_time
torch.set_num_threads(1)
teachers = load_teachers(sys.argv[3:])
size = Resources(device="cpu").resolved_batch_size()
batches = [empty_batch(size, teacher.preprocessing.size).random_(0, 256) for teacher in teachers]

def once():
    for teacher, batch in zip(teachers, batches):
        teacher.logits(batch)

once()
print("ready", flush=True)
sys.stdin.readline()
start, cpu, rounds = perf_counter(), process_time(), 0
while perf_counter() - start < float(sys.argv[2]):
    once()
    rounds += 1
crops = rounds * size
print(crops / (perf_counter() - start), (process_time() - cpu) / crops * 1000)
"""


class Rate(NamedTuple):
    crops: float
    """Per second, of all processes together."""
    cpu_ms: float
    """For each crop."""


def build_rate(cores: list[int], processes: int, photos: Path, arguments: argparse.Namespace) -> Rate:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "build_once.py"
        script.write_text(BUILD)
        settings = {
            "source": str(photos),
            "out": str(Path(folder) / "out"),
            "teachers": arguments.teacher,
            "classes": arguments.classes,
            "crops": arguments.crops,
            "images_per_shard": 5,
            "workers": processes,
            "device": "cpu",
        }
        done = subprocess.run(
            [sys.executable, str(script), json.dumps(cores), json.dumps(settings)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return Rate(*map(float, done.stdout.split()))


def bare_rate(cores: list[int], arguments: argparse.Namespace) -> Rate:
    """Crops/s of one bare teacher on each of `cores`, all at once."""
    command = [sys.executable, "-c", CONTROL]
    started = [
        subprocess.Popen(
            [*command, str(core), str(arguments.seconds), *arguments.teacher],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for core in cores
    ]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    rates = [Rate(*map(float, process.communicate()[0].split())) for process in started]
    return Rate(sum(rate.crops for rate in rates), statistics.mean(rate.cpu_ms for rate in rates))


def copied(photos: Path, folder: Path, copies: int) -> Path:
    """The same photos under several names: enough shards for every worker to have many."""
    for photo in photos.rglob("*.*"):
        for number in range(copies):
            copy = folder / photo.relative_to(photos).parent / f"{photo.stem}-{number}{photo.suffix}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(photo, copy)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", required=True)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--classes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--crops", type=int, default=50)
    parser.add_argument("--copies", type=int, default=4, help="Of each image, for enough shards of 5.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=CONTROL_SECONDS, help="Of each control.")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: arguments.workers]
    if len(cores) < arguments.workers:
        sys.exit(f"{arguments.workers} workers need as many cores; this process may use {len(cores)}")
    many = arguments.workers
    with tempfile.TemporaryDirectory() as folder:
        photos = copied(arguments.images, Path(folder), arguments.copies)
        kinds: dict[str, Callable[[], Rate]] = {
            "bare teacher, 1 core": lambda: bare_rate(cores[:1], arguments),
            f"bare teachers, {many} cores": lambda: bare_rate(cores, arguments),
            "1 worker, 1 core": lambda: build_rate(cores[:1], 1, photos, arguments),
            f"{many} workers, {many} cores": lambda: build_rate(cores, many, photos, arguments),
            f"1 process, {many} cores": lambda: build_rate(cores, 1, photos, arguments),
        }
        rates: dict[str, list[Rate]] = {name: [] for name in kinds}
        for _ in range(arguments.rounds):
            for name, measure in kinds.items():
                rates[name].append(measure())
    print_table(rates, arguments)


def print_table(rates: dict[str, list[Rate]], arguments: argparse.Namespace) -> None:
    load = os.getloadavg()[2]
    print(
        f"{time.strftime('%Y-%m-%d')}, {len(arguments.teacher)} teachers, {arguments.crops} crops per image, ", end=""
    )
    print(f"median of {arguments.rounds} rounds, load average of the last 15 minutes {load:.1f}")
    bare, bare_many, one, several, threads = rates
    bases = {bare: bare, bare_many: bare, one: one, several: one, threads: one}
    for name, base in bases.items():
        ratio = statistics.median(a.crops / b.crops for a, b in zip(rates[name], rates[base], strict=True))
        rate, cpu = (statistics.median(column) for column in zip(*rates[name], strict=True))
        print(f"  {name:<22} {rate:>8.1f} crops/s  {cpu:>7.2f} CPU ms a crop   {ratio:.2f}x {base}")


if __name__ == "__main__":
    main()
