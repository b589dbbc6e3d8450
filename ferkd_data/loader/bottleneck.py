"""Names what a training waits for, from the measured times, and says in one line what to do about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LOADER_SHARE = 0.1
"""Of the time between batches: what a training may wait for its loader before the loader counts as the bottleneck."""
HERE_SHARE = 0.5
"""Of the windows: where more were made in the training process, because no worker was ready, it is too early to judge.
"""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The settings and the machine, as far as advice depends on them."""

    num_workers: int
    crops_per_image: int
    spread: bool
    decode_device: bool
    cuda: bool
    """Whether a GPU could decode."""
    cores: int
    """Cores that this rank may use."""

    @property
    def free_cores(self) -> bool:
        return self.num_workers < self.cores


def cores_of_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Cores that this process may use, divided by the ranks that a launcher started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = environment.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(ranks))) if ranks.isdecimal() else cores


def judge(
    setup: Setup, *, wait: float, hand_over: float, step: float, stages: Mapping[str, float], here_share: float
) -> tuple[str, str]:
    """The bottleneck, and advice. Times in seconds; `stages` as in `STAGES`.

    >>> setup = Setup(num_workers=2, crops_per_image=4, spread=False, decode_device=False, cuda=False, cores=8)
    >>> judge(setup, wait=9, hand_over=0, step=1, stages={"read": 15, "decode": 3}, here_share=0)[0]
    'read'
    >>> judge(setup, wait=0.1, hand_over=0, step=10, stages={"read": 15, "decode": 3}, here_share=0)[0]
    'your step'
    """
    if wait + hand_over < LOADER_SHARE * (wait + hand_over + step):
        return "your step", "your training step is the bottleneck; a faster loader would gain next to nothing"
    if hand_over > wait:
        return "hand-over", (
            "to_batch, pin_memory or targets='dense' takes its time in your own process, between two steps; make "
            "to_batch cheaper"
        )
    if setup.num_workers and here_share > HERE_SHARE:
        return "unknown", "too early to say: most of these batches were made while the workers were still starting"
    slowest = max(stages, key=lambda stage: stages[stage])
    if setup.num_workers == 0:
        return slowest, (
            f"set num_workers={setup.cores}: batches are made in your own process, in turn with your step; most of the "
            f"time goes to {slowest}"
        )
    return slowest, ADVICE[slowest](setup)


def _read(setup: Setup) -> str:
    return (
        "images and labels arrive slowly: put them on a faster or a local disk, or raise num_workers (now "
        f"{setup.num_workers}), which wait for files side by side"
    )


def _decode(setup: Setup) -> str:
    if setup.decode_device:
        return _on_device(setup)
    if setup.free_cores:
        return _more_workers(setup)
    if setup.crops_per_image == 1:
        return "decode each image once for several crops: crops_per_image=4, spread=True"
    if setup.cuda:
        return "decode on the GPU: decode_device='cuda'"
    return "make the photos smaller once, before the build, or try decode_scale='auto' where they are large"


def _cut(setup: Setup) -> str:
    if setup.decode_device:
        return _on_device(setup)
    if setup.cuda and not setup.free_cores:
        return "cut on the GPU: decode_device='cuda'"
    return _more_workers(setup)


def _on_device(setup: Setup) -> str:
    return (
        "decode_device decodes and cuts in your own process, between two steps; without it, "
        f"{setup.cores} workers do that beside your step"
    )


def _transform(setup: Setup) -> str:
    more = f", or raise num_workers to {setup.cores}" if setup.free_cores else ""
    return f"your transform takes most of the workers' time: make it cheaper, or apply it to batches on the GPU{more}"


def _send(setup: Setup) -> str:
    smaller = "spread or batch_size" if setup.spread else "batch_size"
    return f"mapping memory takes most of the workers' time: lower {smaller}, so that a window's crops take 40 MB"


def _more_workers(setup: Setup) -> str:
    if setup.free_cores:
        return f"raise num_workers from {setup.num_workers} to {setup.cores}, the cores that this process may use"
    return f"{setup.num_workers} workers keep all {setup.cores} cores busy: more cores, or a smaller size, would help"


ADVICE: Mapping[str, Callable[[Setup], str]] = {
    "read": _read,
    "decode": _decode,
    "cut": _cut,
    "label": _more_workers,
    "mix": _more_workers,
    "transform": _transform,
    "send": _send,
}
