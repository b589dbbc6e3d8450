"""Small HTML tables for notebooks, with every string escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence


def html_table(title: str, rows: Sequence[Sequence[str]], *, head: Sequence[str] = ()) -> str:
    """Make a table: a caption, column titles where there are any, and rows whose first cell is their name."""
    heads = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(
        f'<tr><th style="text-align: left">{_text(row[0])}</th>'
        + "".join(f'<td style="text-align: left">{_text(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    top = f"<thead><tr>{heads}</tr></thead>" if heads else ""
    return f"<table><caption>{_text(title)}</caption>{top}<tbody>{body}</tbody></table>"


def _text(text: str) -> str:
    # Isolated, so that marks that reverse the writing direction do not reach beyond their cell.
    return f"<bdi>{html.escape(text)}</bdi>"
