"""What a driver, records and a manifest cost at sizes that no test can build: 1,000 workers, 1 billion images.

    python benchmarks/scale_simulation.py [--shards 313 3418 24415 244141]

Shards are made up: of 4,096 images with four blocks of 50 crops. Nothing is labelled.

- driver: CPU time of the driver, with workers that tell once a second how far they are, as real ones do (what
  Ray itself needs to carry the messages is not in it)
- record: writing and reading back a shard's record, as a worker and a resumed driver do
- manifest: size, time to write, time to parse with all checks, memory that it takes
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

from synthetic import NO_TEACHER

from ferkd_data.builder.shard_files import ShardRecord
from ferkd_data.builder.state import BuildFolder
from ferkd_data.builder.stop import Stop
from ferkd_data.builder.watch.progress import ProgressCounter
from ferkd_data.builder.workers.messages import Labelled, Message, Ready
from ferkd_data.builder.workers.pool import WorkerPool
from ferkd_data.errors import BuildStoppedError
from ferkd_data.format.manifest import (
    BlockEntry,
    CreatedBy,
    CropDistributionEntry,
    Manifest,
    RejectsEntry,
    ShardEntry,
    SourceEntry,
    ThresholdsEntry,
)
from ferkd_data.format.manifest_file import parse_manifest
from ferkd_data.labels.statistics import Statistics

IMAGES, CROPS, BLOCK, BLOCK_BYTES = 4096, 200, 50, 3_860_000
WORKERS, SECONDS, RECORDS = (10, 100, 1000, 3000), 10.0, 300


def files(shard: int) -> tuple[BlockEntry, ...]:
    return tuple(
        BlockEntry(path=f"labels/{shard:05d}-{block:03d}.parquet", block=block, bytes=BLOCK_BYTES, sha256="0" * 64)
        for block in range(CROPS // BLOCK)
    )


class NullObserver:
    def see(self, event: object) -> None:
        pass


class Teller:
    """A worker that labels one shard for ever, and says so every second."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.due = time.monotonic() + number % 1000 / 1000
        self.message: Message = Ready("node", number)

    def location(self, ready: Ready) -> str:
        return "cuda of node"

    def label(self, shard: int) -> None:
        self.message = Labelled(2000, 0)

    def settle(self) -> None:
        pass

    def receive(self) -> Message:
        self.due += 1
        return self.message

    def leave(self) -> None:
        pass

    def end(self, wait_seconds: float) -> None:
        pass


class Tellers:
    when_none_gets_ready = ""

    def __init__(self, count: int) -> None:
        self.count = count

    def room(self) -> int:
        return self.count

    def start(self, number: int) -> Teller:
        return Teller(number)

    def with_messages(self, workers: Sequence[Teller], seconds: float) -> list[Teller]:
        first = min(worker.due for worker in workers)
        time.sleep(max(0.0, min(seconds, first - time.monotonic())))
        now = time.monotonic()
        return [worker for worker in workers if worker.due <= now]


def driver_share(workers: int) -> float:
    """Of a core."""
    counter = ProgressCounter(
        watcher=NullObserver(),
        crops_of=lambda shard: CROPS,
        shards_total=workers,
        images_total=workers * IMAGES,
        crops_total=workers * IMAGES * CROPS,
        num_teachers=1,
    )
    stop = Stop(grace_seconds=0)
    with tempfile.TemporaryDirectory() as name, stop.labelling(), contextlib.suppress(BuildStoppedError):
        pool = WorkerPool(Tellers(workers), BuildFolder(Path(name)), counter, stop)
        threading.Timer(3, lambda: marks.append((time.monotonic(), time.process_time()))).start()
        threading.Timer(3 + SECONDS, stop.request).start()
        marks: list[tuple[float, float]] = []
        pool.label(range(workers))
    (wall, cpu) = marks[0]
    return (time.process_time() - cpu) / (time.monotonic() - wall)


def record_us(folder: BuildFolder) -> tuple[float, float]:
    """(to write, to read), median."""
    record = ShardRecord(
        index=0, rows=IMAGES, files=(), rejects=(), statistics=Statistics(), thresholds=(0.15, 0.3, 0.95)
    )
    (folder.path / "shards").mkdir(parents=True)
    writes = [timed(lambda i=i: folder.files.save(record.model_copy(update={"index": i}))) for i in range(RECORDS)]
    reads = [timed(lambda i=i: folder.files.record(i)) for i in range(RECORDS)]
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
    for workers in WORKERS:
        print(f"a driver of {workers:>6,} workers: {driver_share(workers):.1%} of a core", flush=True)
    with tempfile.TemporaryDirectory() as name:
        write, read = record_us(BuildFolder(Path(name)))
    print(f"a shard's record: {write:.0f} us to write and sync, {read:.0f} us to read\n")
    print("    million                manifest, seconds, seconds,  MB held, MB at most")
    print("     images    shards        MB  to write  to parse")
    for count in shards:
        print(manifest_row(count), flush=True)


if __name__ == "__main__":
    main()
