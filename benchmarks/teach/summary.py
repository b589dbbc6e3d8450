"""From runs to a table: mean, and the difference to the first method, paired by seed, with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t by degrees of freedom, two-sided 95 %."""


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences and half the width of its 95 % interval; infinite for fewer than two."""
    if len(differences) < 2:
        return fmean(differences), math.inf
    freedom = len(differences) - 1
    return fmean(differences), T_975.get(freedom, 1.96) * stdev(differences) / math.sqrt(len(differences))


def table(runs: list[dict[str, Any]], methods: Sequence[str], base: str | None = None) -> str:
    """Markdown: one row per method; differences are in points of top-1 against `base` (default: the first method)."""
    base = base or methods[0]
    by = {(line["method"], line["seed"]): line for line in runs}
    rows = [
        f"| method | seeds | top-1 % | against {base} | NLL | ECE % | s a run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in methods:
        lines = [by[key] for key in sorted(by) if key[0] == method]
        if not lines:
            continue
        paired = [line["top1"] - by[base, line["seed"]]["top1"] for line in lines if (base, line["seed"]) in by]
        mean, half = interval(paired) if paired else (math.nan, math.nan)
        told = "" if method == base else f"{mean:+.1f}" + (f" ± {half:.1f}" if math.isfinite(half) else "")
        told += " (none)" if method != base and math.isfinite(half) and abs(mean) <= half else ""
        average = {name: fmean(line[name] for line in lines) for name in ("top1", "nll", "ece", "seconds")}
        rows.append(
            f"| {method} | {len(lines)} | {average['top1']:.1f} | {told} | {average['nll']:.2f} | "
            f"{average['ece']:.1f} | {average['seconds']:.0f} |"
        )
    return "\n".join(rows)
