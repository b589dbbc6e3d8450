"""Measure where loading time goes: `StageClock` in the process that makes a window, `EpochClock` in the training.

Both measure wall time, not CPU time: a worker that waits for a disk, a server or a core spends that time in the stage
that waits. `stats.py` makes `LoaderStats` of the two.
"""

from __future__ import annotations

import itertools
from time import perf_counter
from typing import Literal, NamedTuple, TypeAlias

STAGES = ("read", "decode", "cut", "label", "mix", "transform", "send")
"""Stages of making a window, in the order of the work.

- read: fetch images and stored labels from disk or server, and compare them with their digests
- decode: from encoded images to pixels
- cut: crop, resize and flip
- label: draw an epoch's crops, and calibrate their targets
- mix: SelfMix
- transform: the user's own augmentation
- send: map the memory that the crops go into, and send the targets to the training process
"""
Spent: TypeAlias = tuple[float, ...]
"""Seconds of each stage, in the order of STAGES."""
Phase: TypeAlias = Literal["prepare", "wait", "hand_over", "step"]
"""Phases of the training process, which is in one at a time."""
NOTHING: Spent = (0.0,) * len(STAGES)


class Stage:
    """`with stage:` adds the time of the block to `stage.seconds`, also where the block raises."""

    __slots__ = ("_began", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = perf_counter()

    def __exit__(self, *raised: object) -> None:
        self.seconds += perf_counter() - self._began


class StageClock:
    """The stages of one maker. Used by one thread at a time; blocks of different stages must not be nested."""

    def __init__(self) -> None:
        self.read, self.decode, self.cut, self.label, self.mix, self.transform, self.send = (Stage() for _ in STAGES)

    def take(self) -> Spent:
        """Return the time of each stage since the last call, and begin to count from zero."""
        stages = (self.read, self.decode, self.cut, self.label, self.mix, self.transform, self.send)
        spent = tuple(stage.seconds for stage in stages)
        for stage in stages:
            stage.seconds = 0.0
        return spent


def spent_on(*, send: float) -> Spent:
    """Return the time of one stage that is measured outside of a StageClock."""
    # "send" is the last of STAGES.
    return (*NOTHING[:-1], send)


def added(first: Spent, second: Spent) -> Spent:
    """Add two times, stage by stage."""
    return tuple(itertools.starmap(lambda a, b: a + b, zip(first, second, strict=True)))


class Times(NamedTuple):
    """An `EpochClock` as it stands; see `LoaderStats` for the fields."""

    epoch: int
    batches: int
    of_batches: int
    images: int
    crops: int
    seconds: dict[Phase, float]
    stage_seconds: dict[str, float]
    here_share: float


class EpochClock:
    """Times one iteration over a loader; its thread calls it, and any thread may ask for `stats`."""

    def __init__(self, epoch: int, of_batches: int) -> None:
        self._epoch, self._of_batches = epoch, of_batches
        self._seconds: dict[Phase, float] = dict.fromkeys(("prepare", "wait", "hand_over", "step"), 0.0)
        self._phase: Phase | None = "prepare"
        """What the training process is doing; None once the iteration has ended."""
        self._since = perf_counter()
        self._stages = NOTHING
        self._batches = self._crops = self._windows = self._windows_here = 0
        self._images = 0.0
        self._images_of_crop = 0.0

    def enter(self, phase: Phase | None) -> None:
        """End the phase that is going on, and begin `phase`."""
        # Monotonic, and one clock for all phases: their sum is the time that has passed.
        now = perf_counter()
        if self._phase is not None:
            self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def add_window(self, *, images: int, crops: int, spent: Spent, by_worker: bool) -> None:
        """Count a window that has come, and whose batches are handed over next; making it took `spent`."""
        self.enter("hand_over")
        self._stages = added(self._stages, spent)
        self._windows += 1
        self._windows_here += not by_worker
        # Images are counted with the crops that they gave: of a window that a loop leaves half-way, half of them.
        self._images_of_crop = images / max(1, crops)

    def give(self, crops: int) -> None:
        """Count a batch that goes to the user's loop, whose step begins."""
        self._batches += 1
        self._crops += crops
        self._images += crops * self._images_of_crop
        self.enter("step")

    def times(self) -> Times:
        """Return the times so far; the phase that is going on counts up to now."""
        # A copy, since the loop's thread may go on meanwhile. Its numbers may be of two moments, one batch apart.
        seconds = dict(self._seconds)
        if self._phase is not None:
            seconds[self._phase] += perf_counter() - self._since
        return Times(
            epoch=self._epoch,
            batches=self._batches,
            of_batches=self._of_batches,
            images=round(self._images),
            crops=self._crops,
            seconds=seconds,
            stage_seconds=dict(zip(STAGES, self._stages, strict=True)),
            here_share=self._windows_here / self._windows if self._windows else 0.0,
        )
