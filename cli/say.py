"""Printing what strangers wrote: their keys, names and paths must not control the terminal."""

from __future__ import annotations

import re

import click

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, marks that reverse the order of what is shown, lone surrogates."""


def printable(text: str) -> str:
    r"""The same text with each such character as its escape, such as \u001b (which is also JSON's)."""
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def say(text: str, *, err: bool = False) -> None:
    click.echo(printable(text), err=err)
