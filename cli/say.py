"""Printing what strangers wrote: their keys, names and paths must not control the terminal."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, marks that reverse the order of what is shown, lone surrogates."""


def printable(text: str) -> str:
    r"""The same text with each such character as its escape, such as \u001b (which is also JSON's)."""
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


_above: Callable[[str], None] | None = None
"""Where lines for stderr go while a live display has the end of the terminal."""


def say(text: str, *, err: bool = False) -> None:
    """Print a text that strangers may have written; to stderr above a live display, where there is one."""
    if err and _above is not None:
        _above(printable(text))
    else:
        click.echo(printable(text), err=err)


@contextmanager
def above(write: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile, lines for stderr go through `write`: click itself would write across the display."""
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
    """From now on, the library's warnings (what is tried again, and why) are lines on stderr."""
    logger = logging.getLogger("ferkd_data")
    if not any(isinstance(handler, _OnStderr) for handler in logger.handlers):
        logger.addHandler(_OnStderr())
