"""Does planning stay quick and small? Time and peak memory of a plan, and the time for a worker to open its shard.

    python benchmarks/plan_scale.py [--images 100000 1000000 10000000]

The images are made up (keys like an ImageNet folder's, no files), so what is measured is the plan itself: `listing` is
the synthetic source alone, `keys` the check that no key comes twice, which tars and Parquet files need. `extension` is
the plan of more crops for a label set of so many images: a join of its keys with the listing (with --extension only,
since its label set has to be written first). Each size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from synthetic import write_label_set

from ferkd_data.builder.base import open_base
from ferkd_data.builder.extension import load_or_make_extension
from ferkd_data.builder.plan import load_or_make_plan, open_plan
from ferkd_data.images import ImageError, ImageRef, LeftOut, Reject
from ferkd_data.images.keys import DuplicateFilter
from ferkd_data.labels.rows import ImageLabels

SHARD = 4096
WORKERS_OPENINGS = 20
COLUMNS = {
    "listing_s": "listing, s",
    "plan_s": "plan, s",
    "keys_s": "keys, s",
    "keys_mb": "MB more, keys",
    "extension_s": "extension, s",
    "peak_mb": "MB, peak",
    "shard_ms": "open a shard, ms",
    "manifest_s": "manifest, s",
    "plan_mb": "MB, plan on disk",
}


class MadeUp:
    """A source of so many images, as long as nobody reads them."""

    class_names = None
    class_folder_names = None
    left_out = LeftOut()
    notes = ()

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.description = f"{num_images} images made up"

    def list_images(self) -> Iterator[ImageRef | Reject]:
        for number in range(self.num_images):
            key = f"n{number // 1300:08d}/n{number // 1300:08d}_{number}"
            yield ImageRef(key=key, target=number // 1300, file=f"{key}.JPEG", offset=0, length=-1)

    def read(self, refs: Iterable[ImageRef]) -> Iterator[bytes | ImageError]:
        raise NotImplementedError

    def read_one(self, ref: ImageRef) -> bytes:
        raise NotImplementedError


def write_labels(folder: Path, source: MadeUp) -> None:
    """One crop of one class for each image."""
    crop = {
        "boxes": np.array([[0, 0, 1, 1]], np.uint16),
        "flip": np.zeros(1, np.bool_),
        "class_index": np.zeros((1, 1), np.uint16),
        "class_prob": np.full((1, 1), 0.5, np.float16),
        "target_prob": np.full(1, 0.5, np.float16),
        "bucket": np.full(1, 2, np.uint8),
    }

    def shards() -> Iterator[list[tuple[ImageLabels, bytes]]]:
        rows: list[tuple[ImageLabels, bytes]] = []
        for ref in source.list_images():
            common = {"key": ref.key, "image_digest": bytes(16), "height": 1, "width": 1, "target": ref.target}
            rows.append((ImageLabels(**common, **crop), b""))  # type: ignore[arg-type]
            if len(rows) == SHARD:
                yield rows
                rows = []
        if rows:
            yield rows

    write_label_set(folder, shards(), num_crops=1, top_k=1, num_classes=65536)


def measure(num_images: int, extension: bool) -> dict[str, float]:
    source = MadeUp(num_images)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / ".build"
        folder.mkdir()
        if extension:
            write_labels(Path(name), source)
            started = time.perf_counter()
            base = open_base(Path(name))
            found["manifest_s"] = time.perf_counter() - started
            settings = base.settings({"crops": 2})
            before = peak_mb()
            started = time.perf_counter()
            load_or_make_extension(source, folder, base, settings)
            found["extension_s"] = time.perf_counter() - started
            found["peak_mb"] = peak_mb() - before
        else:
            found["listing_s"] = seconds_of(source.list_images())
            before = peak_mb()
            started = time.perf_counter()
            load_or_make_plan(source, folder, images_per_shard=SHARD)
            found["plan_s"] = time.perf_counter() - started
            found["peak_mb"] = peak_mb() - before
            with DuplicateFilter() as duplicates:
                keys = (duplicates.seen(item.key) for item in source.list_images())
                found["keys_s"] = seconds_of(keys) - found["listing_s"]
            found["keys_mb"] = peak_mb() - before - found["peak_mb"]
        found["shard_ms"] = 1000 * opening_seconds(folder)
        found["plan_mb"] = (folder / "plan.parquet").stat().st_size / 1e6
    return found


def seconds_of(items: Iterable[object]) -> float:
    started = time.perf_counter()
    for _ in items:
        pass
    return time.perf_counter() - started


def opening_seconds(folder: Path) -> float:
    """Of a worker that begins: the plan, and the images of one shard; median over shards."""
    shards = open_plan(folder).summary.shards
    times = []
    for shard in np.linspace(0, shards - 1, WORKERS_OPENINGS).astype(int).tolist():
        started = time.perf_counter()
        open_plan(folder).refs(shard)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--extension", action="store_true", help="Also plan more crops for a label set of each size.")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.extension)))
        return
    print(f"{'images':>10} " + " ".join(f"{title:>16}" for title in COLUMNS.values()))
    for num_images in arguments.images:
        for extension in (False, True)[: 1 + arguments.extension]:
            command = [sys.executable, __file__, "--measure", str(num_images), *["--extension"][: int(extension)]]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells = (f"{found[name]:>16.2f}" if name in found else f"{'':>16}" for name in COLUMNS)
            print(f"{num_images:>10,} " + " ".join(cells), flush=True)


if __name__ == "__main__":
    main()
