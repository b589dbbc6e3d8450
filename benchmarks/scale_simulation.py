"""What a driver, records and a manifest cost at sizes that no test can build: 1,000 workers, 1 billion images.

    python benchmarks/scale_simulation.py [--shards 313 3418 24415 244141]

Shards are made up: of 4,096 images with four blocks of 50 crops. Nothing is labelled.

- message: CPU time of the driver for what a worker tells once a second (ProgressCounter, which sums up all workers)
- record: writing and reading back a shard's record, as a worker and a resumed driver do
- manifest: size, time to write, time to parse with all checks, memory that it takes
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from synthetic import NO_TEACHER

from ferkd_data.builder.progress import ProgressCounter
from ferkd_data.builder.state import BuildFolder, ShardRecord
from ferkd_data.manifest import (
    BlockEntry,
    CreatedBy,
    CropDistributionEntry,
    Manifest,
    RejectsEntry,
    ShardEntry,
    SourceEntry,
    ThresholdsEntry,
    parse_manifest,
)
from ferkd_data.statistics import Statistics

IMAGES, CROPS, BLOCK, BLOCK_BYTES = 4096, 200, 50, 3_860_000
WORKERS, MESSAGES, RECORDS = 1000, 20_000, 300


def files(shard: int) -> tuple[BlockEntry, ...]:
    return tuple(
        BlockEntry(path=f"labels/{shard:05d}-{block:03d}.parquet", block=block, bytes=BLOCK_BYTES, sha256="0" * 64)
        for block in range(CROPS // BLOCK)
    )


class Nobody:
    def see(self, event: object) -> None:
        pass


def message_us() -> float:
    counter = ProgressCounter(
        watcher=Nobody(),
        crops_of=lambda shard: CROPS,
        shards_total=WORKERS,
        images_total=WORKERS * IMAGES,
        crops_total=WORKERS * IMAGES * CROPS,
        num_teachers=1,
    )
    for worker in range(WORKERS):
        counter.worker_started(worker, "cuda of node")
        counter.shard_begun(worker, worker)
    started = time.process_time()
    for number in range(MESSAGES):
        counter.batch(number % WORKERS, 2000, 0, number % WORKERS)
    return (time.process_time() - started) / MESSAGES * 1e6


def record_us(folder: BuildFolder) -> tuple[float, float]:
    """(to write, to read), median."""
    record = ShardRecord(
        index=0, rows=IMAGES, files=(), rejects=(), statistics=Statistics(), thresholds=(0.15, 0.3, 0.95)
    )
    (folder.path / "shards").mkdir(parents=True)
    writes = [timed(lambda i=i: folder.save(record.model_copy(update={"index": i}))) for i in range(RECORDS)]
    reads = [timed(lambda i=i: folder.record(i)) for i in range(RECORDS)]
    return statistics.median(writes) * 1e6, statistics.median(reads) * 1e6


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def manifest(shards: int) -> Manifest:
    return Manifest(
        created_by=CreatedBy(name="benchmark", version="0"),
        layout="parquet",
        num_images=shards * IMAGES,
        num_crops=CROPS,
        crops_per_block=BLOCK,
        top_k=5,
        num_classes=1000,
        seed=0,
        crop_distribution=CropDistributionEntry(scale=(0.08, 1), ratio=(0.75, 4 / 3), hflip=0.5),
        teachers=(NO_TEACHER,),
        ensemble="mean",
        thresholds=ThresholdsEntry(low=0.15, mid=0.3, top=0.95, confidence="max"),
        source=SourceEntry(description="made up", images_seen=shards * IMAGES, plan_sha256="0" * 64),
        shards=tuple(ShardEntry(index=shard, rows=IMAGES, files=files(shard)) for shard in range(shards)),
        rejects=RejectsEntry(path="rejects.parquet", rows=0, bytes=1, sha256="0" * 64),
        statistics=Statistics(),
    )


def manifest_row(shards: int) -> str:
    made = manifest(shards)
    started = time.process_time()
    text = made.to_json().encode()
    written = time.process_time() - started
    del made
    started = time.process_time()
    parsed = parse_manifest(text, "manifest.json")
    seconds = time.process_time() - started
    del parsed
    tracemalloc.start()
    parsed = parse_manifest(text, "manifest.json")
    held, peak = (size / 1e6 for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    images = len(parsed.shards) * IMAGES / 1e6
    return f"{images:12,.1f} {shards:9,} {len(text) / 1e6:9.1f} {written:9.2f} {seconds:9.2f} {held:9.0f} {peak:9.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[313, 3418, 24415, 244141])
    shards = parser.parse_args().shards
    cost = statistics.median(message_us() for _ in range(3))
    print(f"a message from one of {WORKERS:,} workers: {cost:.1f} us of the driver's CPU time, ", end="")
    print(f"{cost * WORKERS / 1e6:.1%} of a core at one message per worker and second")
    with tempfile.TemporaryDirectory() as name:
        write, read = record_us(BuildFolder(Path(name)))
    print(f"a shard's record: {write:.0f} us to write and sync, {read:.0f} us to read\n")
    print("    million                manifest, seconds, seconds,  MB held, MB at most")
    print("     images    shards        MB  to write  to parse")
    for count in shards:
        print(manifest_row(count), flush=True)


if __name__ == "__main__":
    main()
