"""Make the charts of a report from the collected sums."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.labels.buckets import BUCKETS
from ferkd_data.labels.statistics import PAPER_SHARES, RANGE_EDGES
from ferkd_data.report.charts import (
    Chart,
    Column,
    Table,
    grouped_bars,
    heat_map,
)
from ferkd_data.report.findings import ranges_of
from ferkd_data.report.sketch import GRID, Sketch
from ferkd_data.report.tables import BUCKET_TITLES
from ferkd_data.words import percent

FEWEST_IN_CELL = 10
"""Fewest crops for which a cell of a map is shaded."""
# ".85-.9" in place of "0.85-0.9": twelve names stand side by side.
RANGES = tuple(f"{low:g}-{high:g}".replace("0.", ".") for low, high in itertools.pairwise(RANGE_EDGES))


def p_max_chart(sketch: Sketch) -> Chart:
    """Draw the histogram of p_max in FerKD's ranges, with the paper's beside it."""
    ours = ranges_of(sketch.confidence["max"][0], RANGE_EDGES)
    series = [("this label set", "bar-a", _shares(ours)), ("FerKD paper, ImageNet", "bar-b", PAPER_SHARES)]
    chart = grouped_bars(RANGES, series, title="Crops by p_max", x_title="p_max, the largest probability")
    sums = np.cumsum(_shares(ours)), np.cumsum(PAPER_SHARES)
    columns = (
        Column(title="p_max", numeric=False),
        Column(title="crops"),
        Column(title="share", unit="%"),
        Column(title="aggregate", unit="%"),
        Column(title="paper's share", unit="%"),
        Column(title="paper's aggregate", unit="%"),
    )
    rows = [
        [name, f"{count:,}", f"{share:.2f}", f"{sums[0][i]:.2f}", f"{PAPER_SHARES[i]:.2f}", f"{sums[1][i]:.2f}"]
        for i, (name, count, share) in enumerate(zip(RANGES, ours, _shares(ours), strict=True))
    ]
    table = Table(caption="Crops by p_max, in the ranges of FerKD's table", columns=columns, rows=rows)
    note = (
        "The ranges are FerKD's: wide ones at the left, narrow ones at the right. The paper's teachers were trained "
        "with label smoothing and hardly ever pass 0.95; others do so often."
    )
    return Chart(title=chart.title, svg=chart.svg, table=table, legend=chart.legend, note=note)


def truth_chart(sketch: Sketch) -> Chart | None:
    """Draw the histogram of the ground truth's probability; None where it is not stored."""
    if not sketch.truth.sum():
        return None
    counts = ranges_of(sketch.truth, RANGE_EDGES)
    known = int(sketch.confidence["max"][1].sum())
    inside = sketch.truth_in_top_k / max(known, 1)
    return grouped_bars(
        RANGES,
        [("share of crops", "bar-a", _shares(counts))],
        title="Crops by the ground truth's probability",
        x_title="probability of the ground truth",
        note=f"The ground truth is among the stored classes of {percent(inside)} of the crops.",
    )


def top_k_chart(sketch: Sketch) -> Chart:
    """Draw how much probability a smaller k would keep."""
    # Classes are stored in descending order, so the first k columns are what a smaller k would have stored.
    kept = 100 * np.cumsum(sketch.mass_by_rank) / max(sketch.crops, 1)
    names = [f"k={k + 1}" for k in range(len(kept))]
    chart = grouped_bars(
        # As many bars as fit on a phone; the table has all.
        names[:12],
        [("kept probability", "bar-a", kept.tolist()[:12])],
        title="Probability that the top-k keep",
        x_title="classes kept for each crop",
        note=f"The mean over all crops. With k={len(kept)}, as stored, {percent(kept[-1] / 100)} is kept; the rest is "
        "spread evenly over the other classes in training.",
    )
    rows = [[name, f"{value:.2f}", f"{kept[-1] - value:.2f}"] for name, value in zip(names, kept.tolist(), strict=True)]
    columns = (
        Column(title="classes kept", numeric=False),
        Column(title="probability kept", unit="%"),
        Column(title="lost against the stored ones", unit="%"),
    )
    table = Table(caption=chart.title, columns=columns, rows=rows)
    return Chart(title=chart.title, svg=chart.svg, table=table, note=chart.note)


def map_charts(sketch: Sketch) -> list[Chart]:
    """Draw maps of the crops' positions and sizes by confidence, after FerKD's Fig. 1."""
    cells = _map_cells(sketch.crops)
    counts = _coarser(sketch.centres.sum(axis=0), cells)
    enough = counts >= FEWEST_IN_CELL
    axes: dict[str, Any] = {
        "x_title": "centre, left to right",
        "y_title": "centre, top to bottom",
        "note": f"{cells} x {cells} cells; one with fewer than {FEWEST_IN_CELL} crops is left blank.",
    }

    def mean(sums: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        means: npt.NDArray[np.float64] = np.full(counts.shape, np.nan)
        # A mean of few crops is chance, and would draw the eye.
        means[enough] = _coarser(sums, cells)[enough] / counts[enough]
        return means

    charts = [
        heat_map(mean(sketch.centre_p_max), title="Mean p_max by the crop's centre", value_title="mean p_max", **axes),
        heat_map(
            sketch.areas / max(sketch.crops, 1) * 100,
            title="Crops by area and p_max",
            x_title="share of the image's area",
            y_title="p_max",
            value_title="% of the crops",
            upwards=True,
        ),
    ]
    for code, name in enumerate(BUCKETS):
        if sketch.centres[code].any():
            charts.append(
                heat_map(
                    100 * mean(sketch.centres[code]),
                    title=f"Share of {BUCKET_TITLES[name]} crops by the crop's centre",
                    value_title="% of the cell's crops",
                    digits=1,
                    **axes,
                )
            )
    return charts


def _map_cells(crops: int) -> int:
    """Choose how many cells a map has along each side: fewer where the crops are few."""
    fine = (GRID, GRID // 2, GRID // 4)
    # Twice as many on average as a cell needs, since crops lie mostly in the middle.
    return next((cells for cells in fine if crops >= 2 * FEWEST_IN_CELL * cells * cells), fine[-1])


def _coarser(grid: npt.NDArray[Any], cells: int) -> npt.NDArray[Any]:
    """Sum a (GRID, GRID) map into (cells, cells)."""
    size = GRID // cells
    summed: npt.NDArray[Any] = grid.reshape(cells, size, cells, size).sum(axis=(1, 3))
    return summed


def in_use_chart(sketch: Sketch) -> Chart:
    """Draw the histogram of images by their number of crops in use under `ferkd`, in at most ten bins."""
    crops = sketch.num_crops
    bins = min(10, crops)
    edges = [round(i * crops / bins) for i in range(bins + 1)]
    # Images without any crop in use have a bar of their own.
    counts = [int(sketch.in_use[0])]
    names = ["0"]
    for low, high in itertools.pairwise(edges):
        counts.append(int(sketch.in_use[low + 1 : high + 1].sum()))
        names.append(str(high) if high == low + 1 else f"{low + 1}-{high}")
    total = max(sum(counts), 1)
    mean = float((np.arange(crops + 1) * sketch.in_use).sum() / total)
    chart = grouped_bars(
        names,
        [("images", "bar-a", [100 * count / total for count in counts])],
        title="Images by crops in use",
        x_title="crops in use of an image under ferkd",
        note=f"On average {mean:.1f} of {crops} crops of an image are in use; under fkd all {crops} are.",
    )
    columns = (Column(title="crops in use", numeric=False), Column(title="images"), Column(title="share", unit="%"))
    rows = [[name, f"{count:,}", f"{100 * count / total:.2f}"] for name, count in zip(names, counts, strict=True)]
    table = Table(caption=chart.title, columns=columns, rows=rows)
    return Chart(title=chart.title, svg=chart.svg, table=table, note=chart.note)


def _shares(counts: list[int]) -> list[float]:
    total = max(sum(counts), 1)
    return [100 * count / total for count in counts]
