"""Draw runs as an SVG that is readable on light and on dark pages.

    python benchmarks/teach/figure.py runs.jsonl figure.svg --curves hard,fkd,ferkd,all-blend --base hard

On the left, top-1 over the steps of `--curves`: the mean of the seeds, and from the lowest to the highest as a band. On
the right, every method's difference to `--base`, paired by seed, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from summary import FEWEST, interval

Run = dict[str, Any]
COLOURS = ("#6e7781", "#d1570a", "#0969da", "#2da44e", "#8250df", "#bf3989")
STYLE = """
text { font: 12px sans-serif; fill: #24292f }
.title { font-weight: bold } .small { font-size: 11px } .grid { stroke: #d0d7de } .zero { stroke: #57606a }
.none { opacity: .45 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .grid { stroke: #30363d } .zero { stroke: #9198a1 } }
"""
WIDTH, LEFT, GAP = 900, 400, 190


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Map low..high to start..end."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def line(x1: float, y1: float, x2: float, y2: float, rest: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {rest}/>'


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{words}</text>'


def points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def curves(runs: list[Run], methods: Sequence[str], height: float) -> list[str]:
    """Draw top-1 over steps."""
    found = {m: lines for m in methods if (lines := [run["curve"] for run in runs if run["method"] == m])}
    values = [point["top1"] for lines in found.values() for curve in lines for point in curve]
    low, high = 5 * math.floor(min(values) / 5), 5 * math.ceil(max(values) / 5)
    last = max(point["step"] for lines in found.values() for curve in lines for point in curve)
    x, y = scale(0, last, 40, LEFT), scale(low, high, height - 40, 40)
    parts = [text(40, 20, "top-1 % on photos never seen, over steps", kind="title")]
    for tick in range(low, high + 1, 5):
        parts += [line(40, y(tick), LEFT, y(tick), 'class="grid"'), text(34, y(tick) + 4, str(tick), "end", "small")]
    steps = sorted({point["step"] for lines in found.values() for curve in lines for point in curve})
    parts += [text(x(step), height - 22, f"{step:,}", "middle", "small") for step in steps]
    for number, (method, lines) in enumerate(found.items()):
        colour, legend = COLOURS[number % len(COLOURS)], height - 62 - 16 * number
        at = [(step, [point["top1"] for curve in lines for point in curve if point["step"] == step]) for step in steps]
        upper, lower = [(x(s), y(max(v))) for s, v in at], [(x(s), y(min(v))) for s, v in at]
        parts += [
            f'<polygon points="{points([*upper, *reversed(lower)])}" fill="{colour}" opacity=".15"/>',
            f'<polyline points="{points([(x(s), y(fmean(v))) for s, v in at])}" fill="none" stroke="{colour}" '
            'stroke-width="2"/>',
            line(LEFT - 130, legend, LEFT - 110, legend, f'stroke="{colour}" stroke-width="3"'),
            text(LEFT - 104, legend + 4, f"{method} ({len(lines)} seeds)", kind="small"),
        ]
    return parts


def differences(runs: list[Run], base: str) -> dict[str, tuple[float, float, int]]:
    """Compute mean difference, half of its interval and the number of seeds, of each method with enough seeds."""
    top1 = {(run["method"], run["seed"]): run["top1"] for run in runs}
    paired: dict[str, list[float]] = {}
    for (method, seed), value in sorted(top1.items()):
        if method != base and (base, seed) in top1:
            paired.setdefault(method, []).append(value - top1[base, seed])
    return {method: (*interval(values), len(values)) for method, values in paired.items() if len(values) >= FEWEST}


def intervals(runs: list[Run], base: str, height: float) -> list[str]:
    """Draw paired differences; those inside their interval are faint."""
    rows = sorted(differences(runs, base).items(), key=lambda row: -row[1][0])
    low = math.floor(min(0.0, *(mean - half for _, (mean, half, _) in rows)))
    high = math.ceil(max(0.0, *(mean + half for _, (mean, half, _) in rows)))
    x, y = scale(low, high, LEFT + GAP, WIDTH - 20), scale(-0.5, len(rows) - 0.5, 34, height - 40)
    parts = [text(LEFT + 60, 20, f"points of top-1 against {base}, 95 % interval", kind="title")]
    step = max(1, round((high - low) / 8))
    for tick in range(step * math.ceil(low / step), high + 1, step):
        parts += [
            line(x(tick), 34, x(tick), height - 40, 'class="grid"'),
            text(x(tick), height - 22, f"{tick:+d}" if tick else "0", "middle", "small"),
        ]
    parts.append(line(x(0), 34, x(0), height - 40, 'class="zero"'))
    for number, (method, (mean, half, seeds)) in enumerate(rows):
        faint = "none" if abs(mean) <= half else ""
        colour = COLOURS[3] if mean > 0 else COLOURS[1]
        parts += [
            text(LEFT + GAP - 10, y(number) + 4, f"{method} ({seeds})", "end", "small"),
            f'<g class="{faint}">'
            + line(x(mean - half), y(number), x(mean + half), y(number), f'stroke="{colour}" stroke-width="2"')
            + f'<circle cx="{x(mean):.1f}" cy="{y(number):.1f}" r="4" fill="{colour}"/></g>',
        ]
    return parts


def draw(runs: list[Run], methods: Sequence[str], base: str) -> str:
    """Draw both panels as an SVG document."""
    height = max(300, 90 + 20 * len(differences(runs, base)))
    body = "\n".join([*curves(runs, methods, height), *intervals(runs, base, height)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Top-1 over training steps, and differences to {base} with 95 % intervals">\n'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("figure", type=Path)
    parser.add_argument("--curves", default="hard,fkd,ferkd,all-blend")
    parser.add_argument("--base", default="hard")
    arguments = parser.parse_args()
    runs = [json.loads(row) for row in arguments.runs.read_text(encoding="utf-8").splitlines()]
    arguments.figure.write_text(draw(runs, arguments.curves.split(","), arguments.base), encoding="utf-8")


if __name__ == "__main__":
    main()
