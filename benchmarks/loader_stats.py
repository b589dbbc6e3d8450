"""What measuring costs: `loader.stats()` is always on, so how much of the loading time do its clocks take?

    python benchmarks/loader_stats.py [--images 640] [--rounds 9]

Photos and made-up labels are those of loader_speed.py. Two answers, in one run:

- on and off side by side: the same loader with its clocks, and with clocks that do nothing, without workers, one after
  the other in each round; CPU time per crop, so that other processes of the machine count little
- by counting: the CPU time of one clocked block, measured in a loop, times the blocks of a batch, beside the CPU time
  that making the batch takes

The first is the whole difference, within the noise of a shared machine; the second resolves what the first cannot.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from loader_features import cpu_ms
from loader_speed import write_labels, write_photos

import ferkd_data as fd
from ferkd_data.loader.clocks import NOTHING, EpochClock, Stage, StageClock

BATCH = 64
CROPS_PER_IMAGE = 4
REPEATS = 200_000


class NoStage(Stage):
    """A block that is not timed."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *raised: object) -> None:
        pass


class NoClock(StageClock):
    def __init__(self) -> None:
        no_stage = NoStage()
        self.read = self.decode = self.cut = self.label = self.mix = self.transform = self.send = no_stage

    def take(self) -> tuple[float, ...]:
        return NOTHING


def seconds_of_a_block() -> float:
    """CPU time of `with stage:` around nothing, less that of the loop."""
    stage = Stage()
    begin = time.process_time()
    for _ in range(REPEATS):
        with stage:
            pass
    timed = time.process_time() - begin
    begin = time.process_time()
    for _ in range(REPEATS):
        pass
    return (timed - (time.process_time() - begin)) / REPEATS


def seconds_of_a_batch() -> float:
    """CPU time of what the clocks do once for each batch, besides the blocks."""
    clock, stages = EpochClock(0, 1), StageClock()
    begin = time.process_time()
    for _ in range(REPEATS // 10):
        stages.take()
        clock.enter("hand_over")
        clock.give(BATCH)
        clock.enter("hand_over")
        clock.enter("wait")
    return (time.process_time() - begin) / (REPEATS // 10)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments.images, arguments.rounds)


def run(folder: Path, num_images: int, rounds: int) -> None:
    photos = folder / "photos"
    write_photos(photos, num_images)
    write_labels(photos, folder / "labels")
    labels = fd.open_labels(folder / "labels")

    def loader() -> fd.CropLoader:
        return fd.CropLoader(
            labels,
            images=photos,
            batch_size=BATCH,
            crops_per_image=CROPS_PER_IMAGE,
            verify_images="never",
            cache_dir=folder / "cache",
        )

    with_clock, without = loader(), loader()
    without._maker.clock = NoClock()
    found: dict[str, list[float]] = {"on": [], "off": []}
    for made in (with_clock, without):
        sum(len(targets) for _, targets in made)
    for _ in range(rounds):
        for name, made in (("on", with_clock), ("off", without)):
            found[name].append(cpu_ms(lambda made=made: sum(len(targets) for _, targets in made)))
    on, off = statistics.median(found["on"]), statistics.median(found["off"])
    ratios = sorted(a / b for a, b in zip(found["on"], found["off"], strict=True))
    print(f"\nbatch {BATCH}, {CROPS_PER_IMAGE} crops an image, 224 px, no workers, median of {rounds} rounds\n")
    print(f"clocks on   {on:.4f} ms CPU a crop")
    print(f"clocks off  {off:.4f} ms CPU a crop")
    print(
        f"ratio       {statistics.median(ratios):.4f} (median of the rounds' ratios; {ratios[0]:.3f}..{ratios[-1]:.3f})"
    )

    images = BATCH // CROPS_PER_IMAGE
    blocks = 3 * images + 4
    block = statistics.median(seconds_of_a_block() for _ in range(rounds))
    batch = statistics.median(seconds_of_a_batch() for _ in range(rounds))
    cost, work = blocks * block + batch, on / 1000 * BATCH
    print(
        f"\none block   {block * 1e6:.2f} us; a batch of {images} images has {blocks}, and {batch * 1e6:.1f} us besides"
    )
    print(f"a batch     {cost * 1e6:.0f} us of clocks beside {work * 1e3:.2f} ms of work: {cost / work:.2%}")


if __name__ == "__main__":
    main()
