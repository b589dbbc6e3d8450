"""How far a build is: images, rate, time left, rejects, and its workers where there are several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .display import Frame, clock, show_frames


@contextmanager
def show_progress() -> Iterator[Callable[[Any], None]]:
    """Yields a function that takes a ferkd_data.builder.Progress. Everything goes to stderr."""
    with show_frames(Frame(what="build", amount="listing images, loading teachers")) as report:
        yield lambda progress: report(frame(progress))


def frame(progress: Any) -> Frame:
    """What there is to show of a ferkd_data.builder.Progress."""
    left = "time left not known yet" if progress.seconds_left is None else f"{clock(progress.seconds_left)} left"
    rejects = f"{progress.rejects:,} reject{'' if progress.rejects == 1 else 's'}"
    return Frame(
        what="build",
        done=progress.images_done,
        total=progress.images_total,
        amount=f"{progress.images_done:,}/{progress.images_total:,} images",
        details=(
            f"{progress.crops_per_second:,.1f} crops/s",
            left,
            rejects,
            *_stragglers(progress),
            f"{progress.shards_done:,} of {progress.shards_total:,} shards",
            f"{progress.forwards_done:,} of {progress.forwards_total:,} forwards",
        ),
        workers=_workers(progress),
    )


def _stragglers(progress: Any) -> tuple[str, ...]:
    """Where several work: how many, their rates from the slowest to the fastest, and those far behind."""
    if len(progress.workers) < 2:
        return ()
    rates = [worker.crops_per_second for worker in progress.workers]
    slow = [str(worker.worker) for worker in progress.workers if worker.worker in progress.stragglers]
    behind = (f"far behind: {', '.join(slow[:8])}{', …' if len(slow) > 8 else ''}",) if slow else ()
    return (f"{len(rates):,} workers at {min(rates):,.1f} to {max(rates):,.1f} crops/s", *behind)


def _workers(progress: Any) -> tuple[str, ...]:
    """One line for each, those far behind first."""
    if len(progress.workers) < 2:
        return ()
    late = set(progress.stragglers)
    ordered = sorted(progress.workers, key=lambda worker: (worker.worker not in late, worker.worker))
    return tuple(
        f"worker {worker.worker:>4}  shard {worker.shard:>6}  {worker.crops_per_second:>9,.1f} crops/s"
        + ("  far behind" if worker.worker in late else "")
        for worker in ordered
    )
