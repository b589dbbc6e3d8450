"""Numbers that a caller gives, whatever their type hints say."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from ferkd_data.errors import UsageError


def check_at_least(least: int, **numbers: Any) -> None:
    """None is an argument that was not given. Raises UsageError that names the first one that cannot be right."""
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, Integral) or number < least):
            raise UsageError(f"{name} must be a whole number, at least {least}; got {number!r}")
