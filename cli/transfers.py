"""How far a transfer or a conversion is, on stderr: a live line on a terminal, else one line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click

LOG_SECONDS = 30.0


def show_bytes() -> Callable[[int, int], None]:
    def line(done: int, total: int | None, seconds: float) -> str:
        of = "" if total is None else f" of {total / 1e6:,.1f}"
        return f"{done / 1e6:,.1f}{of} MB, {done / 1e6 / seconds:,.1f} MB/s"

    return _show(line)


def show_images() -> Callable[[int, int | None], None]:
    """Without a total, where the images are not counted beforehand."""

    def line(done: int, total: int | None, seconds: float) -> str:
        of = "" if total is None else f" of {total:,}"
        return f"{done:,}{of} images, {done / seconds:,.1f} images/s"

    return _show(line)


def _show(line: Callable[[int, int | None, float], str]) -> Callable[[int, int | None], None]:
    start = last = time.monotonic()

    def report(done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        # Who does not know the end cannot end the live line either.
        live = sys.stderr.isatty() and total is not None
        if not live and now - last < LOG_SECONDS:
            return
        last = now
        end = "\r" if live and done < (total or 0) else "\n"
        click.echo(line(done, total, max(now - start, 1e-9)) + end, err=True, nl=False)

    return report
