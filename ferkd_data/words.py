"""Numbers in words, as commands, reports and cards show them."""

from __future__ import annotations


def percent(share: float, digits: int = 1) -> str:
    """Return a share in 0..1 as `12.3%`. Rounding never turns a share above 0 into 0%, nor one below 1 into 100%.

    >>> [percent(share) for share in (0, 0.0004, 0.1234, 0.9996, 1)]
    ['0.0%', '<0.1%', '12.3%', '>99.9%', '100.0%']
    """
    smallest = 10.0**-digits
    text = f"{100 * share:.{digits}f}"
    if share > 0 and text == f"{0:.{digits}f}":
        return f"<{smallest:.{digits}f}%"
    if share < 1 and text == f"{100:.{digits}f}":
        return f">{100 - smallest:.{digits}f}%"
    return f"{text}%"


def in_percent(share: float, digits: int = 1) -> str:
    """Return a share in 0..1 without the unit, for a column whose title has it."""
    return percent(share, digits).removesuffix("%")


def count(number: int, thing: str) -> str:
    """Return a number with its noun: `1 image`, `1,200 images`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
