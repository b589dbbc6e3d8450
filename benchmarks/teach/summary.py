"""From runs to tables: means, and differences to other methods, paired by seed, with their 95 % intervals.

python benchmarks/teach/summary.py hard,fkd runs.jsonl [more.jsonl …]      differences to hard and to fkd

A method that was run on another label set than the first run's is shown as `METHOD @ LABELS`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t by degrees of freedom, two-sided 95 %."""

FEWEST = 3
"""Seeds that a difference needs to be shown with an interval: with two, the interval itself is mostly chance."""


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences and half the width of its 95 % interval; infinite for fewer than two."""
    if len(differences) < 2:
        return fmean(differences), math.inf
    freedom = len(differences) - 1
    return fmean(differences), T_975.get(freedom, 1.96) * stdev(differences) / math.sqrt(len(differences))


COLUMNS = (("top1", ".1f"), ("agreement", ".1f"), ("nll", ".2f"), ("ece", ".1f"), ("cpu_seconds", ".0f"))
"""What of a run the table shows, as the mean over its seeds."""


def difference(runs: Sequence[dict[str, Any]], method: str, base: str) -> str:
    """Render the paired difference in points of top-1; one inside its 95 % interval is called none.

    Fewer seeds than FEWEST have no interval.
    """
    by = {(line["method"], line["seed"]): line["top1"] for line in runs}
    seeds = sorted(seed for name, seed in by if name == method and (base, seed) in by)
    if method == base or not seeds:
        return ""
    mean, half = interval([by[method, seed] - by[base, seed] for seed in seeds])
    if len(seeds) < FEWEST:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} ± {half:.1f}" + (" (none)" if abs(mean) <= half else "")


def table(runs: list[dict[str, Any]], methods: Sequence[str], bases: Sequence[str] | None = None) -> str:
    """Render Markdown: one row per method, with its difference to each of `bases` (default: the first method)."""
    bases = bases or methods[:1]
    against = [f"against {base}" for base in bases]
    heads = ["method", "seeds", "top-1 %", *against, "agrees with teachers %", "NLL", "ECE %", "CPU s a run"]
    rows = [heads, ["---"] * len(heads)]
    for method in methods:
        lines = [line for line in runs if line["method"] == method]
        if not lines:
            continue
        means = {
            name: format(fmean(line[name] for line in lines), form) if all(name in line for line in lines) else ""
            for name, form in COLUMNS
        }
        top1 = means.pop("top1")
        told = [difference(runs, method, base) for base in bases]
        rows.append([method, str(len(lines)), top1, *told, *means.values()])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def every_run(runs: list[dict[str, Any]], methods: Sequence[str]) -> str:
    """Render Markdown: top-1 of every run, one column per seed."""
    seeds = sorted({line["seed"] for line in runs})
    by = {(line["method"], line["seed"]): f"{line['top1']:.2f}" for line in runs}
    rows = [["method", *(f"seed {seed}" for seed in seeds)], ["---"] * (len(seeds) + 1)]
    rows += [[method, *(by.get((method, seed), "") for seed in seeds)] for method in methods]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def labels_of(run: dict[str, Any]) -> str:
    return Path(run["setup"]["labels"]).name


def main() -> None:
    against, *files = sys.argv[1:]
    runs = [json.loads(line) for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    first = labels_of(runs[0])
    for run in runs:
        if labels_of(run) != first:
            run["method"] += f" @ {labels_of(run)}"
    methods = list(dict.fromkeys(run["method"] for run in runs))
    methods.sort(key=lambda method: -fmean(run["top1"] for run in runs if run["method"] == method))
    print(table(runs, methods, against.split(",")), every_run(runs, methods), sep="\n\n")


if __name__ == "__main__":
    main()
