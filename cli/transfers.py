"""How far a transfer is, on stderr: a live line on a terminal, else one line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click

LOG_SECONDS = 30.0


def show_bytes() -> Callable[[int, int], None]:
    start = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        live = sys.stderr.isatty()
        if not live and now - last < LOG_SECONDS:
            return
        last = now
        rate = done / 1e6 / max(now - start, 1e-9)
        end = "\r" if live and done < total else "\n"
        click.echo(f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate:,.1f} MB/s{end}", err=True, nl=False)

    return report
