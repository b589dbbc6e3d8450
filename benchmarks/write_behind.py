"""What does it bring to write a shard while the next one is labelled?

    python benchmarks/write_behind.py [--rate 4000] [--images 2048] [--crops 200] [--shard 512] [--rounds 3]

The teacher stands in for a GPU: it sleeps for as long as it would take to label a batch at --rate, and leaves the cores
alone. The pictures are of 64x48. `behind` is a build as it is; `waiting` waits for each shard to be written before it
begins the next. The two take turns, each build in a process of its own. `gap` is the time between the last answer of a
shard and the first of the next one, less what the batches take that are asked for in between.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from build_growth import write_photos

from ferkd_data.builder.labelling.label_shard import ASKED_AHEAD

WAYS = ("behind", "waiting")
TEACHER = """
import time, torch
from torch import nn

class Sleeping(nn.Module):
    preprocessing = {"size": 32, "mean": (0.5,), "std": (0.25,)}

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(48, 1000)

    def forward(self, x):
        began = time.perf_counter()
        answer = self.head(x[:, :, ::8, ::8].flatten(1))
        if len(x) > 1:
            time.sleep(max(0, len(x) / RATE - (time.perf_counter() - began)))
        return answer

def sleeping():
    torch.manual_seed(0)
    return Sleeping()
"""
BUILD = """
import json, sys
from time import perf_counter
import ferkd_data as fd
from ferkd_data.builder.labelling.write_behind import WriteBehind

settings = json.loads(sys.argv[1])
if settings.pop("way") == "waiting":
    label = WriteBehind.label

    def label_and_wait(behind, shard, on_batch):
        label(behind, shard, on_batch)
        behind.settle()

    WriteBehind.label = label_and_wait

seen = -1
class Marks:
    at = []
    def see(self, event):
        global seen
        if isinstance(event, fd.builder.Progress) and event.crops_done > seen:
            seen = event.crops_done
            self.at.append((perf_counter(), event.shard, event.crops_done))

fd.build(watchers=[Marks()], **settings)
print(json.dumps(Marks.at))
"""


def measure(way: str, layout: str, folder: Path, arguments: argparse.Namespace) -> tuple[float, float]:
    """Crops per second, and the median gap in seconds."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        settings = {
            "way": way,
            "source": str(folder / "photos"),
            "out": f"{place}/out",
            "teachers": ["python:sleeping_teacher:sleeping"],
            "crops": arguments.crops,
            "images_per_shard": arguments.shard,
            "layout": layout,
            "classes": str(folder / "classes.txt"),
            "batch_size": arguments.batch,
            "device": "cpu",
        }
        command = [sys.executable, str(folder / "build_once.py"), json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
        marks = json.loads(done.stdout)
    steps = [(after[0] - before[0], after[1] != before[1]) for before, after in itertools.pairwise(marks)]
    usual = statistics.median(step for step, between in steps if not between)
    gaps = [step - (1 + ASKED_AHEAD) * usual for step, between in steps if between]
    return (marks[-1][2] - marks[0][2]) / (marks[-1][0] - marks[0][0]), statistics.median(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=4000)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--crops", type=int, default=200)
    parser.add_argument("--shard", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "photos", arguments.images)
        (folder / "classes.txt").write_text("".join(f"c{number:03d}\n" for number in range(1000)))
        (folder / "sleeping_teacher.py").write_text(TEACHER.replace("RATE", str(arguments.rate)))
        (folder / "build_once.py").write_text(BUILD)
        print(f"{time.strftime('%Y-%m-%d')}, {arguments}")
        for layout in ("parquet", "webdataset"):
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            gaps: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(arguments.rounds):
                for way in WAYS if number % 2 == 0 else reversed(WAYS):
                    rate, gap = measure(way, layout, folder, arguments)
                    rates[way].append(rate)
                    gaps[way].append(gap)
            for way in WAYS:
                rate, gap = statistics.median(rates[way]), statistics.median(gaps[way]) * 1000
                print(f"  {layout:<10} {way:<8} {rate:>8.0f} crops/s   gap {gap:>7.1f} ms")
            ratio = statistics.median(b / w for b, w in zip(rates["behind"], rates["waiting"], strict=True))
            print(f"  {layout:<10} behind / waiting {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
