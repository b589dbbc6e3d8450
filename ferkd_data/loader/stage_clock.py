"""Measures the stages of making a window, in whichever process makes it.

Wall time, not CPU time: a worker that waits for a disk, a server or a core spends that time in the stage that waits.
"""

from __future__ import annotations

import itertools
from time import perf_counter
from typing import TypeAlias

STAGES = ("read", "decode", "cut", "label", "mix", "transform", "send")
"""In the order of the work.

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
        """The time of each stage since the last call, which then counts from zero."""
        stages = (self.read, self.decode, self.cut, self.label, self.mix, self.transform, self.send)
        spent = tuple(stage.seconds for stage in stages)
        for stage in stages:
            stage.seconds = 0.0
        return spent


def spent_on(*, send: float) -> Spent:
    """Time of one stage that is measured outside of a StageClock."""
    return (*NOTHING[:-1], send)


def added(first: Spent, second: Spent) -> Spent:
    """The sum of both, stage by stage."""
    return tuple(itertools.starmap(lambda a, b: a + b, zip(first, second, strict=True)))
