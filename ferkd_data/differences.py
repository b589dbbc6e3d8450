"""Compare two saved states: a mismatch names both values."""

from __future__ import annotations

from typing import Any


def describe_differences(saved: Any, present: Any, name: str = "") -> list[str]:
    """Return a line `field: saved X, now Y` for every leaf that differs."""
    if isinstance(saved, dict) and isinstance(present, dict):
        # A field that one side lacks counts as None: a state from before an optional setting existed equals its
        # default.
        names = [*saved, *(key for key in present if key not in saved)]
        return [
            line
            for key in names
            for line in describe_differences(saved.get(key), present.get(key), f"{name}.{key}" if name else key)
        ]
    # Of lists that differ in length nobody can say which items belong together: both are shown whole.
    if isinstance(saved, list) and isinstance(present, list) and len(saved) == len(present):
        pairs = enumerate(zip(saved, present, strict=True))
        return [line for i, (a, b) in pairs for line in describe_differences(a, b, f"{name}[{i}]")]
    # States keep what the user chose under "settings"; nobody wrote that prefix.
    return [] if saved == present else [f"{name.removeprefix('settings.')}: saved {saved!r}, now {present!r}"]
