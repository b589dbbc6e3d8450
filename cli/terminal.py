"""Output that is safe on a terminal, and numbers in words.

Texts of strangers (keys, names, paths) are printed with control characters as escapes. Standard output and error may
lose their reader (`2>&1 | head -1`, a closed terminal, a full disk below a log) without ending a command.
"""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import click

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, marks that reverse the writing direction, lone surrogates."""


def printable(text: str) -> str:
    r"""Return a text with each UNPRINTABLE character as its escape, such as \u001b (which is also JSON's)."""
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def size(num_bytes: float) -> str:
    """Return bytes in a readable unit: `712 bytes`, `1.2 GB`, in powers of 1,000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


_above: Callable[[str], None] | None = None
"""Takes lines for stderr while a live display occupies the end of the terminal."""


def say(text: str, *, err: bool = False) -> None:
    """Print a text that strangers may have written; to stderr above a live display, where there is one."""
    if err and _above is not None:
        _above(printable(text))
    else:
        click.echo(printable(text), err=err)


@contextmanager
def above(write: Callable[[str], None]) -> Iterator[None]:
    """Send lines for stderr through `write` for as long as the context lasts: click would write across the display."""
    global _above
    _above = write
    try:
        yield
    finally:
        _above = None


class _OnStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"ferkd-data: {record.getMessage()}", err=True)


def say_what_is_logged() -> None:
    """Print the library's warnings from now on (what is tried again, and why) as lines on stderr."""
    logger = logging.getLogger("ferkd_data")
    # Once for each process: tests run several commands in one.
    if not any(isinstance(handler, _OnStderr) for handler in logger.handlers):
        logger.addHandler(_OnStderr())


def say_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, indent: int = 0) -> None:
    """Print rows below the titles of their columns. A column of numbers, such as 12 or <0.1%, is aligned to the right.

    The last column is not padded.
    """
    # Before widths are measured, since escapes are longer than what they stand for.
    lines = [[printable(cell) for cell in row] for row in (head, *rows)]
    numeric = [
        bool(rows) and all(row[i].lstrip("<>")[:1].isdigit() for row in lines[1:] if row[i]) for i in range(len(head))
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        say(" " * indent + "  ".join(cells).rstrip())


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Give the escapes, as JSON writes them, of characters that a stream's encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("ferkd_data.escape", _escaped)


@contextmanager
def _escaping(stream: TextIO) -> Iterator[None]:
    """Let a stream write characters as escapes where its encoding (Latin-1, or that of a Windows pipe) lacks them."""
    # Only real files: what tests and notebooks put in their place takes every text.
    if not isinstance(stream, io.TextIOWrapper) or stream.errors != "strict":
        yield
        return
    stream.reconfigure(errors="ferkd_data.escape")
    try:
        yield
    finally:
        stream.reconfigure(errors="strict")


class Forgiving:
    """A text stream that discards its output once nobody can read it; everything else is the stream's own."""

    def __init__(self, stream: TextIO, *, forgives: tuple[type[OSError], ...]) -> None:
        self._stream = stream
        self._forgives = forgives

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except self._forgives:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except self._forgives:
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        """Redirect the descriptor to /dev/null: for what is in the buffer, and for worker processes that inherit it."""
        with suppress(OSError, ValueError):  # a stream without a descriptor, as tests have
            nowhere = os.open(os.devnull, os.O_WRONLY)
            # The descriptor itself: Python flushes the stream once more at its end, and would fail there.
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Keep a command running when nobody reads its messages. Results on a full disk are still an error."""
    before = sys.stdout, sys.stderr
    # Python sets these to None where the descriptor is closed (`2>&-`).
    out, err = (stream or open(os.devnull, "w") for stream in before)  # noqa: PTH123
    sys.stdout = Forgiving(out, forgives=(BrokenPipeError,))
    sys.stderr = Forgiving(err, forgives=(OSError,))
    try:
        with _escaping(out), _escaping(err):
            yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
