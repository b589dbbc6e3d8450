"""How far a transfer or a conversion is: bytes or images, rate, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .display import Frame, Rate, show_frames

OnProgress = Callable[[int, "int | None"], None]
"""Gets how much is done, and how much there is in all where that is known."""


@contextmanager
def show_bytes(what: str) -> Iterator[OnProgress]:
    """Yields what takes (bytes done, bytes in all)."""

    def amount(done: int, total: int | None) -> str:
        return _size(done) if total is None else f"{_size(done)} of {_size(total)}"

    with _show(what, amount, lambda rate: f"{_size(rate)}/s") as report:
        yield report


@contextmanager
def show_images(what: str) -> Iterator[OnProgress]:
    """Yields what takes (images done, images in all); without a total where they are not counted beforehand."""

    def amount(done: int, total: int | None) -> str:
        return f"{done:,} images" if total is None else f"{done:,} of {total:,} images"

    with _show(what, amount, lambda rate: f"{rate:,.1f} images/s") as report:
        yield report


@contextmanager
def _show(what: str, amount: Callable[[int, int | None], str], speed: Callable[[float], str]) -> Iterator[OnProgress]:
    rate = Rate()
    with show_frames(Frame(what=what, amount="starting")) as show:

        def report(done: int, total: int | None) -> None:
            rate.add(done)
            left = () if total is None or done >= total else (rate.left(total),)
            details = (speed(rate.per_second), *left)
            show(Frame(what=what, done=done, total=total, amount=amount(done, total), details=details))

        yield report


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
