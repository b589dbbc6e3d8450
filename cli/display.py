"""Progress on stderr: live lines that fit a terminal's width, elsewhere a plain line now and then.

A command describes a moment as a `Frame` (builds: images, rate, time left, rejects, workers; transfers: bytes or
images, rate, time left), and this module lays it out. Nothing ever wraps: what does not fit is left out, the least
important first.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .terminal import above, printable, say, size

if TYPE_CHECKING:
    from ferkd_data.format.progress import TransferProgress

LOG_SECONDS = 30.0
"""Seconds between plain lines where there is no terminal."""
RATE_SECONDS = 20.0
"""Seconds over which rates are taken."""
REFRESHES_PER_SECOND = 4
BAR_CELLS = 30
WORKERS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The progress of a command at one moment."""

    what: str
    """The command, such as `build`."""
    done: float = 0
    total: float | None = None
    """None where it is unknown; then there is no bar."""
    amount: str = ""
    """The amount done in words, such as `12 of 40 images`."""
    details: tuple[str, ...] = ()
    """The most important first: those that fit are shown."""
    workers: tuple[str, ...] = ()
    """A line for each, where there are several."""


Report = Callable[[Frame], None]


@contextmanager
def show_frames(first: Frame) -> Iterator[Report]:
    """Yield a function that shows a frame. A terminal shows `first` until then."""
    with _live(first) if _is_terminal() else _plain() as report:
        yield report


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


@contextmanager
def _plain() -> Iterator[Report]:
    # The first frame is written at once. Nothing is before that: an error at the start stays one line.
    last = float("-inf")

    def report(frame: Frame) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_SECONDS or (frame.total is not None and frame.done >= frame.total):
            last = time.monotonic()
            say(plain_line(frame), err=True)

    yield report


def plain_line(frame: Frame) -> str:
    """Put a frame into one line, without a bar."""
    return f"{frame.what}: " + ", ".join(part for part in (frame.amount, *frame.details) if part)


@contextmanager
def _live(first: Frame) -> Iterator[Report]:
    # Imported here: a command without a terminal does not need it.
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    view = _View(first)
    # Rich draws in a thread of its own, so that the clock goes on while a command waits; it only reads the view. What
    # is printed to stderr meanwhile appears above the lines.
    display = Live(view, console=console, refresh_per_second=REFRESHES_PER_SECOND, redirect_stdout=False)
    with display, above(lambda text: console.print(Text(text), soft_wrap=True)):
        yield view.take


class _View:
    """The newest frame, laid out for the width that the terminal has when it is drawn."""

    def __init__(self, frame: Frame) -> None:
        self._lock = threading.Lock()
        # The command's thread writes it, Rich's thread reads it.
        self._frame = frame
        self._started = time.monotonic()

    def take(self, frame: Frame) -> None:
        with self._lock:
            self._frame = frame

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        with self._lock:
            frame = self._frame
        # The clock is read at each drawing, so that it goes on while no frame comes.
        lines = layout(frame, options.max_width, time.monotonic() - self._started, ascii_only=options.ascii_only)
        # One row less than the terminal has: Rich would scroll, and leave the display's lines behind.
        for line in lines[: max(1, console.height - 1)]:
            yield Text(line, no_wrap=True, overflow="crop", end="\n")


def layout(frame: Frame, width: int, elapsed: float, *, ascii_only: bool = False) -> list[str]:
    """Lay out a frame in lines of at most `width` cells."""
    comma = ", " if ascii_only else " · "
    room = max(width, 1)
    lines = [_fitted([*_head(frame, room, ascii_only), frame.amount], room, " ")]
    details = [*frame.details, f"{clock(elapsed)} so far"]
    lines.append(_fitted(["", *details], room, comma, first=" " * 2))
    # One more fits as well as the line "and 1 more".
    shown = frame.workers if len(frame.workers) <= WORKERS_SHOWN + 1 else frame.workers[:WORKERS_SHOWN]
    lines += [_fitted(["", worker], room, "", first=" " * 2) for worker in shown]
    if len(shown) < len(frame.workers):
        lines.append(_fitted(["", f"and {len(frame.workers) - len(shown):,} more"], room, "", first=" " * 2))
    return [line for line in lines if line.strip()]


def _head(frame: Frame, room: int, ascii_only: bool) -> list[str]:
    """Return the command, and a bar with its percentage that fills what the amount leaves."""
    if frame.total is None:
        return [frame.what]
    share = 1.0 if frame.total <= 0 else min(1.0, max(0.0, frame.done / frame.total))
    # Never 100 % before the end.
    percent = f"{int(100 * share):>3} %"
    cells = min(BAR_CELLS, room - _cells(f"{frame.what}  {percent} {frame.amount}"))
    # Narrower bars show nothing that the percentage does not.
    if cells < 4:
        return [frame.what, percent]
    full = int(share * cells)
    marks = ("#", "-") if ascii_only else ("━", "╌")
    return [frame.what, marks[0] * full + marks[1] * (cells - full), percent]


def _fitted(parts: list[str], room: int, between: str, *, first: str = "") -> str:
    """Join as many parts as fit, in their order; a first one that is too long is cut."""
    line = first
    for part in (printable(part).replace("\n", " ").replace("\t", " ") for part in parts if part):
        longer = line + part if line.strip() == "" else line + between + part
        if _cells(longer) > room:
            if line.strip() == "":
                return _cut(longer, room)
            break
        line = longer
    return line


def _cut(text: str, room: int) -> str:
    while text and _cells(text) > room:
        text = text[:-1]
    return text


def _cells(text: str) -> int:
    """Return the columns that a terminal needs: wide letters take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


class Rate:
    """The rate over the last RATE_SECONDS, and the time that the rest takes."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float]] = deque([(time.monotonic(), 0.0)])

    def add(self, done: float) -> None:
        """Note the amount that is done now."""
        now = time.monotonic()
        self._marks.append((now, done))
        # The mark before the window stays, so that the rate covers all of it.
        while len(self._marks) > 2 and self._marks[1][0] < now - RATE_SECONDS:
            self._marks.popleft()

    @property
    def per_second(self) -> float:
        """Amount per second; 0 as long as nothing is known."""
        (start, before), (end, done) = self._marks[0], self._marks[-1]
        return (done - before) / (end - start) if end > start else 0.0

    def left(self, total: float) -> str:
        """Return `0:01:30 left`, or that it is not known yet."""
        rate = self.per_second
        return f"{clock((total - self._marks[-1][1]) / rate)} left" if rate > 0 else "time left not known yet"


def clock(seconds: float) -> str:
    """Return `1:02:03`, after the number of days where there are any."""
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days:,} d " if days else "") + f"{hours}:{minutes:02d}:{seconds:02d}"


@contextmanager
def show_progress() -> Iterator[Callable[[Any], None]]:
    """Yield a function that shows a ferkd_data.builder.Progress on stderr."""
    with show_frames(Frame(what="build", amount="listing images, loading teachers")) as report:
        yield lambda progress: report(frame(progress))


def frame(progress: Any) -> Frame:
    """Describe a ferkd_data.builder.Progress."""
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
    """Describe several workers: their number, their slowest and fastest rate, and those far behind."""
    if len(progress.workers) < 2:
        return ()
    rates = [worker.crops_per_second for worker in progress.workers]
    slow = [str(worker.worker) for worker in progress.workers if worker.worker in progress.stragglers]
    behind = (f"far behind: {', '.join(slow[:8])}{', …' if len(slow) > 8 else ''}",) if slow else ()
    return (f"{len(rates):,} workers at {min(rates):,.1f} to {max(rates):,.1f} crops/s", *behind)


def _workers(progress: Any) -> tuple[str, ...]:
    """Return a line for each worker, those far behind first."""
    if len(progress.workers) < 2:
        return ()
    late = set(progress.stragglers)
    # False sorts before True.
    ordered = sorted(progress.workers, key=lambda worker: (worker.worker not in late, worker.worker))
    return tuple(
        f"worker {worker.worker:>4}  shard {worker.shard:>6}  {worker.crops_per_second:>9,.1f} crops/s"
        + ("  far behind" if worker.worker in late else "")
        for worker in ordered
    )


@contextmanager
def show_transfer(what: str) -> Iterator[Callable[[TransferProgress], None]]:
    """Yield a function that shows a transfer (files and bytes) or a conversion (images, files and bytes)."""
    rate = Rate()
    with show_frames(Frame(what=what, amount="starting")) as show:

        def report(progress: TransferProgress) -> None:
            files = _of(progress.files, progress.files_total, "file")
            done_bytes = size(progress.bytes)
            if progress.images is None:
                done, total = progress.bytes, progress.bytes_total
                amount = done_bytes if total is None else f"{done_bytes} of {size(total)}"
                details, speed = [files], lambda: f"{size(rate.per_second)}/s"
            else:
                done, total = progress.images, progress.images_total
                amount = _of(done, total, "image")
                details, speed = [files, done_bytes], lambda: f"{rate.per_second:,.1f} images/s"
            rate.add(done)
            details += _speed_and_time(rate, speed, done, total)
            show(Frame(what=what, done=done, total=total, amount=amount, details=tuple(details)))

        yield report


@contextmanager
def show_images(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function that shows (images done, images in all); the total is None where it is unknown."""
    rate = Rate()
    with show_frames(Frame(what=what, amount="starting")) as show:

        def report(done: int, total: int | None) -> None:
            rate.add(done)
            details = _speed_and_time(rate, lambda: f"{rate.per_second:,.1f} images/s", done, total)
            show(Frame(what=what, done=done, total=total, amount=_of(done, total, "image"), details=tuple(details)))

        yield report


def _of(done: int, total: int | None, thing: str) -> str:
    """Return `1 file`, `2 files`, or with a total `1 of 2 files`."""
    if total is None:
        return f"{done:,} {thing}{'' if done == 1 else 's'}"
    return f"{done:,} of {total:,} {thing}s"


def _speed_and_time(rate: Rate, speed: Callable[[], str], done: int, total: int | None) -> list[str]:
    left = [] if total is None or done >= total else [rate.left(total)]
    return [speed(), *left]
