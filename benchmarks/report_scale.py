"""What `ferkd-data report` takes for small and large label sets: time, peak memory, size of the file.

    python benchmarks/report_scale.py --images 4096 40960 409600 --crops 200

    python benchmarks/report_scale.py --photos FOLDER --crops 16

The labels are made up; with --photos they are those of photos in class folders, whose pictures the report then shows.
Each report is written by a process of its own, several times; the median counts. Prints a table with the ratio to the
smallest set.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from synthetic import random_labels, write_label_set

from ferkd_data.crops import CropDistribution, draw_crops
from ferkd_data.images import image_size, open_source
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.storage import image_digest

PER_SHARD = 4096
DIFFERENT = 256
"""Images whose labels are drawn. Later ones repeat them under other keys: drawing takes longer than all the rest."""
IMPORTS = """
import resource
import ferkd_data as fd
from ferkd_data.report.make import write_report
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
CHILD = """
import resource, sys, time
import ferkd_data as fd
from ferkd_data.report.make import write_report
start = time.perf_counter(), time.process_time()
result = write_report(sys.argv[1], sys.argv[2], images=sys.argv[3] or None)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(time.perf_counter() - start[0], time.process_time() - start[1], peak, result.bytes)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[4096, 409_600])
    parser.add_argument("--photos", type=Path, default=None)
    parser.add_argument("--crops", type=int, default=200)
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=None)
    options = parser.parse_args()
    shown = "with pictures" if options.photos else "no images shown"
    print(f"{options.crops} crops of each image, top-{options.top_k} of {options.classes} classes, {shown}")
    print(f"{'images':>9} {'crops':>12} {'seconds':>8} {'CPU s':>8} {'ratio':>6} {'s per million images':>21} "
          f"{'peak MiB':>9} {'file kB':>8}")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        first = 0.0
        for num_images in [0] if options.photos else options.images:
            out = Path(scratch) / str(num_images)
            if options.photos:
                num_images = label_photos(out, options)
            else:
                write_labels(out, num_images, options)
            found = [measure(out, Path(scratch) / "report.html", options.photos) for _ in range(options.rounds)]
            wall, cpu, peak, size = (statistics.median(values) for values in zip(*found, strict=True))
            first = first or cpu
            print(
                f"{num_images:>9,} {num_images * options.crops:>12,} {wall:>8.1f} {cpu:>8.1f} {cpu / first:>6.1f} "
                f"{1e6 * cpu / num_images:>21.0f} {peak:>9.0f} {size / 1000:>8.0f}",
                flush=True,
            )
    imports = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True).stdout
    print(f"a process that has imported all of it and done nothing: {float(imports):.0f} MiB")
    print(f"the benchmark itself took {resource.getrusage(resource.RUSAGE_SELF).ru_utime:.0f} s to write the labels")


def measure(labels: Path, report: Path, photos: Path | None) -> tuple[float, float, float, float]:
    """(seconds, CPU seconds, peak MiB, bytes) of a report in a process of its own; imports are not counted in time."""
    command = [sys.executable, "-c", CHILD, str(labels), str(report), str(photos or "")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wall, cpu, peak, size = map(float, text.split())
    return wall, cpu, peak, size


def label_photos(out: Path, options: argparse.Namespace) -> int:
    """A label set of made-up labels for the crops that a build would draw of the photos; returns how many there are."""
    settings = {"num_crops": options.crops, "top_k": options.top_k, "num_classes": options.classes}
    generator = np.random.default_rng(0)
    drawn = [random_labels(f"drawn{n}", generator, **settings, image=str(n).encode()) for n in range(DIFFERENT)]
    source = open_source(options.photos)
    refs = list(source.list_images())

    def rows(start: int) -> Iterator[tuple[ImageLabels, bytes]]:
        for number, ref in enumerate(refs[start : start + PER_SHARD], start):
            data = source.read_one(ref)
            height, width = image_size(data)
            crops = draw_crops(ref.key, height, width, seed=0, count=options.crops, distribution=CropDistribution())
            yield (
                replace(
                    drawn[number % DIFFERENT],
                    key=ref.key,
                    image_digest=image_digest(data),
                    height=height,
                    width=width,
                    target=ref.target,
                    boxes=crops.boxes,
                    flip=crops.flip,
                ),
                b"",
            )

    write_label_set(out, map(rows, range(0, len(refs), PER_SHARD)), **settings, crops_per_block=50)
    return len(refs)


def write_labels(out: Path, num_images: int, options: argparse.Namespace) -> None:
    """A label set of made-up labels, in shards of PER_SHARD images."""
    settings = {"num_crops": options.crops, "top_k": options.top_k, "num_classes": options.classes}
    generator = np.random.default_rng(0)
    drawn = [random_labels(f"drawn{n}", generator, **settings, image=str(n).encode()) for n in range(DIFFERENT)]

    def rows(start: int) -> Iterator[tuple[ImageLabels, bytes]]:
        for number in range(start, min(start + PER_SHARD, num_images)):
            digest = number.to_bytes(8, "little") * 2
            yield (
                replace(drawn[number % DIFFERENT], key=f"n{number % 1000:08d}/image{number}", image_digest=digest),
                b"",
            )

    begun = time.perf_counter()
    write_label_set(out, map(rows, range(0, num_images, PER_SHARD)), **settings, crops_per_block=50)
    print(f"# {num_images:,} images written in {time.perf_counter() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
