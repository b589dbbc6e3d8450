"""How long does it take to read one image at random, from each kind of source?

    python benchmarks/image_sources.py [--images 1000] [--rounds 5]

The same images (random bytes of 60 to 160 kB, as photos of ImageNet have) lie in a folder, a tar and Parquet files as
several writers make them. Each source reads the same images in the same random order; decoding is left out. Printed is
the CPU time and the time of an image, medians over the rounds, and the ratio to the folder. "PyArrow alone" is the way
without reading single pages. Files are in the page cache.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ferkd_data.images import ImageSource, open_source

JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"


def contents(number: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [JPEG + rng.bytes(int(rng.integers(60_000, 160_000))) for _ in range(number)]


def sources(folder: Path, images: list[bytes]) -> Iterator[tuple[str, Path]]:
    for i, image in enumerate(images):
        path = folder / "folder" / "class" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    yield "folder", folder / "folder"
    tars = folder / "tars"
    tars.mkdir()
    with tarfile.open(tars / "0.tar", "w") as tar:
        for i, image in enumerate(images):
            info = tarfile.TarInfo(f"{i:06d}.jpg")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    yield "tar", tars
    table = pa.table({"image": [{"bytes": image, "path": f"{i:06d}.jpg"} for i, image in enumerate(images)]})
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_index": True}
    writers: dict[str, dict[str, Any]] = {
        "Parquet as `datasets` 5 writes it (plain, not compressed)": {**plain, "use_content_defined_chunking": True},
        "Parquet, zstd, no dictionary, row groups of 100": {
            "compression": "zstd",
            "use_dictionary": False,
            "row_group_size": 100,
            "write_batch_size": 1,
        },
        "Parquet, PyArrow's defaults, row groups of 100": {"row_group_size": 100},
        "Parquet, PyArrow's defaults": {},
    }
    for name, options in writers.items():
        path = folder / f"{len(name)}.parquet"
        pq.write_table(table, path, **options)
        yield name, path


def measure(source: ImageSource, order: np.ndarray, rounds: int) -> tuple[float, float]:
    """(CPU ms, ms) for an image."""
    refs = [ref for ref in source.list_images() if hasattr(ref, "offset")]
    cpu, wall = [], []
    for _ in range(rounds):
        started, used = time.perf_counter(), time.process_time()
        for place in order:
            source.read_one(refs[place])
        cpu.append((time.process_time() - used) / len(order) * 1e3)
        wall.append((time.perf_counter() - started) / len(order) * 1e3)
    return median(cpu), median(wall)


@click.command(help=__doc__)
@click.option("--images", default=1000, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(images: int, rounds: int) -> None:
    order = np.random.default_rng(1).permutation(images)
    print("| source | CPU ms an image | ms an image | folder = 1 (CPU) |\n| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        first = None
        for told, path in sources(Path(name), contents(images)):
            cpu, wall = measure(open_source(path), order, rounds)
            first = first or cpu
            print(f"| {told} | {cpu:.3f} | {wall:.3f} | {cpu / first:.1f} |", flush=True)
            if path.suffix == ".parquet":
                source = open_source(path)
                source._rows._pages.column = lambda *_: None
                cpu, wall = measure(source, order, 1)
                print(f"| … by PyArrow alone | {cpu:.3f} | {wall:.3f} | {cpu / first:.1f} |", flush=True)


if __name__ == "__main__":
    main()
