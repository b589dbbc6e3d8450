"""Aligned tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from .say import printable, say


def say_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, indent: int = 0) -> None:
    """Print rows below the titles of their columns. A column whose cells begin with digits is aligned to the right.

    The last column is not padded, and may be as long as it likes.
    """
    lines = [[printable(cell) for cell in row] for row in (head, *rows)]
    numeric = [bool(rows) and all(row[i][:1].isdigit() for row in lines[1:] if row[i]) for i in range(len(head))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        say(" " * indent + "  ".join(cells).rstrip())
