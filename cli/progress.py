"""A live display on a terminal; elsewhere, a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

LOG_SECONDS = 30.0


@contextmanager
def show_progress() -> Iterator[Callable[[Any], None]]:
    """Yields a function that takes a ferkd_data.builder.Progress. Everything goes to stderr."""
    if sys.stderr.isatty():
        with _live() as report:
            yield report
    else:
        yield _plain()


def line(progress: Any) -> str:
    left = "?" if progress.seconds_left is None else clock(progress.seconds_left)
    return (
        f"{progress.images_done}/{progress.images_total} images, {progress.crops_per_second:.1f} crops/s, "
        f"{left} left, {progress.rejects} rejects, {progress.forwards_done:,} of {progress.forwards_total:,} forwards, "
        f"shard {progress.shard} ({progress.shards_done} of {progress.shards_total} done){_workers(progress)}"
    )


def _workers(progress: Any) -> str:
    """Of several: how many, their rates from the slowest to the fastest, and those far behind."""
    if len(progress.workers) < 2:
        return ""
    rates = [worker.crops_per_second for worker in progress.workers]
    slow = [f"{w.worker} ({w.crops_per_second:.1f})" for w in progress.workers if w.worker in progress.stragglers]
    behind = f", far behind: {', '.join(slow)}" if slow else ""
    return f", {len(rates)} workers at {min(rates):.1f} to {max(rates):.1f} crops/s{behind}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _plain() -> Callable[[Any], None]:
    last = time.monotonic() - LOG_SECONDS

    def report(progress: Any) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_SECONDS or progress.images_done == progress.images_total:
            last = time.monotonic()
            click.echo(line(progress), err=True)

    return report


@contextmanager
def _live() -> Iterator[Callable[[Any], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task("listing images, loading teachers", total=None)

        def report(progress: Any) -> None:
            display.update(
                task, description=line(progress), completed=progress.images_done, total=progress.images_total
            )

        yield report
