"""Draw charts as static SVG, each with a table of the same numbers.

Charts need no script, can be printed, and take their colours from the page's style sheet, which follows the reader's
light or dark mode. All are drawn for a width of 400 units, which is readable on a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from ferkd_data.words import in_percent, percent

WIDTH = 400
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 40
"""Margins of the plot area, for the axes."""
COLOUR_BAR = 18
"""Height of a heat map's colour bar."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """Head of a table's column."""

    title: str
    numeric: bool = True
    unit: str = ""


@dataclass(frozen=True)
class Cell:
    """Cell of a table; a sortable table sorts it by `value`, if it has one."""

    text: str
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Table of a page."""

    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[Sequence[Cell | str]]
    sortable: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Chart of a page, with the table of its numbers."""

    title: str
    svg: Markup
    table: Table
    note: str = ""
    legend: tuple[tuple[str, str], ...] = field(default=())
    """Entries of the legend: (class of the style sheet, meaning)."""


def tag(name: str, content: str = "", /, **attributes: object) -> Markup:
    """Write an SVG element. Attributes and text are escaped; `_` in an attribute's name stands for `-`."""
    # `class_` is `class`: Python's own word cannot name an argument.
    pairs = ((key.rstrip("_").replace("_", "-"), _number(value)) for key, value in attributes.items())
    given = Markup("").join(Markup(' {}="{}"').format(*pair) for pair in pairs)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), given, content)


def _number(value: object) -> object:
    # Hundredths of a unit are below what a screen shows.
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def svg(height: int, parts: Sequence[Markup], title: str) -> Markup:
    """Write the SVG of a chart, with its title for screen readers."""
    content = tag("title", escape(title)) + Markup("").join(parts)
    return tag("svg", content, viewBox=f"0 0 {WIDTH} {height}", role="img", class_="chart", aria_label=title)


def grouped_bars(
    names: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float]]],
    *,
    title: str,
    x_title: str,
    note: str = "",
    first_column: str = "",
) -> Chart:
    """Draw bars side by side for each name; `series` is (name, class of the style sheet, shares in percent)."""
    # More names than fit side by side are turned, and need room below.
    slanted = len(names) > 8
    height, bottom = (250, BOTTOM + 26) if slanted else (220, BOTTOM)
    top = _nice_top(max((max(values, default=0) for _, _, values in series), default=0))
    plot_w, plot_h = WIDTH - LEFT - RIGHT, height - TOP - bottom
    parts = _y_axis(top, plot_h)
    step = plot_w / len(names)
    # 8 % of a step on each side keep the groups apart.
    bar = 0.84 * step / len(series)
    for i, name in enumerate(names):
        x = LEFT + i * step
        for j, (_, kind, values) in enumerate(series):
            tall = plot_h * values[i] / top
            parts.append(
                tag("rect", x=x + 0.08 * step + j * bar, y=TOP + plot_h - tall, width=bar, height=tall, class_=kind)
            )
        parts.append(_name_below(name, x + step / 2, TOP + plot_h + 13, slanted))
    parts.append(tag("text", x_title, x=LEFT + plot_w / 2, y=height - 8, class_="axis", text_anchor="middle"))
    columns = (
        Column(title=first_column or x_title, numeric=False),
        *(Column(title=f"{name}", unit="%") for name, _, _ in series),
    )
    rows = [[name, *(f"{values[i]:.2f}" for _, _, values in series)] for i, name in enumerate(names)]
    return Chart(
        title=title,
        svg=svg(height, parts, title),
        table=Table(caption=title, columns=columns, rows=rows),
        note=note,
        legend=tuple((kind, name) for name, kind, _ in series) if len(series) > 1 else (),
    )


def _name_below(name: str, x: float, y: float, slanted: bool) -> Markup:
    if not slanted:
        return tag("text", name, x=x, y=y, class_="tick", text_anchor="middle")
    turned = f"rotate(-45 {x + 3:g} {y:g})"
    return tag("text", name, x=x + 3, y=y, class_="tick", text_anchor="end", transform=turned)


def _y_axis(top: float, plot_h: float) -> list[Markup]:
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = TOP + plot_h * (1 - share)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", f"{share * top:g} %", x=LEFT - 4, y=y + 4, class_="tick", text_anchor="end"))
    return parts


def _nice_top(largest: float) -> float:
    """Choose the end of an axis, so that a quarter of it is a round number."""
    # Multiples of 4, from 4 on: the grid has lines at every quarter.
    for top in (1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 60, 80, 100):
        if largest <= top:
            return float(top)
    return largest


def heat_map(
    values: npt.NDArray[np.float64],
    *,
    title: str,
    x_title: str,
    y_title: str,
    value_title: str,
    ends: tuple[str, str] = ("0", "1"),
    upwards: bool = False,
    square: bool = True,
    digits: int = 2,
    note: str = "",
) -> Chart:
    """Draw a grid of cells, shaded by `values` (rows, columns); NaN is left blank.

    With `upwards`, the first row is the lowest. The table has at most 5 x 5 cells, each the mean over an area.
    """
    rows, columns = values.shape
    size = WIDTH - LEFT - RIGHT
    plot_h = size if square else 220
    height = TOP + plot_h + BOTTOM + COLOUR_BAR
    cell_w, cell_h = size / columns, plot_h / rows
    # nanmax warns where all are NaN.
    largest = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    parts = [tag("rect", x=LEFT, y=TOP, width=size, height=plot_h, class_="plot")]
    # A cell of 0 must not look like one that is left blank.
    least = 0.0 if np.isnan(values).any() else 1e-9
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value) and value >= least and largest > 0:
            y = TOP + (rows - 1 - row if upwards else row) * cell_h
            # The palest shade that can still be told from the paper.
            shade = max(0.03, round(float(value) / largest, 2))
            # Slightly larger than its cell, so that no seams show between pixels.
            parts.append(
                tag("rect", x=LEFT + column * cell_w, y=y, width=cell_w + 0.3, height=cell_h + 0.3, fill_opacity=shade)
            )
    bottom = TOP + plot_h
    for text, x, anchor in ((ends[0], LEFT, "start"), (ends[1], WIDTH - RIGHT, "end")):
        parts.append(tag("text", text, x=x, y=bottom + 14, class_="tick", text_anchor=anchor))
    for text, y in ((ends[1] if upwards else ends[0], TOP + 10), (ends[0] if upwards else ends[1], bottom)):
        parts.append(tag("text", text, x=LEFT - 4, y=y, class_="tick", text_anchor="end"))
    middle = TOP + plot_h / 2
    parts.append(tag("text", x_title, x=LEFT + size / 2, y=bottom + 30, class_="axis", text_anchor="middle"))
    turned = f"rotate(-90 12 {middle:g})"
    parts.append(tag("text", y_title, x=12, y=middle, class_="axis", text_anchor="middle", transform=turned))
    if largest:
        parts += _colour_bar(bottom + BOTTOM, f"{largest:.{digits}f} {value_title}")
    return Chart(
        title=title,
        svg=svg(height, [tag("g", Markup("").join(parts), class_="heat")], title),
        table=_coarse_table(values, title, y_title, x_title, value_title, digits),
        note=note,
    )


def _colour_bar(y: float, most: str) -> list[Markup]:
    """Draw ten shades from 0 to the largest value, with both ends labelled."""
    width = 12
    shades = [
        tag("rect", x=LEFT + 14 + i * width, y=y, width=width + 0.3, height=10, fill_opacity=max(0.03, (i + 1) / 10))
        for i in range(10)
    ]
    ends = (("0", LEFT + 10, "end"), (most, LEFT + 20 + 10 * width, "start"))
    return shades + [tag("text", text, x=x, y=y + 9, class_="tick", text_anchor=at) for text, x, at in ends]


def _coarse_table(
    values: npt.NDArray[np.float64], title: str, y_title: str, x_title: str, value_title: str, digits: int
) -> Table:
    rows, columns = (min(5, size) for size in values.shape)
    # (rows, cells, columns, cells): means over axes 1 and 3 are means over blocks of cells.
    trimmed = values.reshape(rows, values.shape[0] // rows, columns, values.shape[1] // columns)
    known = np.isfinite(trimmed)
    sums = np.where(known, trimmed, 0).sum(axis=(1, 3))
    counts = known.sum(axis=(1, 3))
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    heads = [f"{x_title} {i / columns:g}..{(i + 1) / columns:g}" for i in range(columns)]
    body = [
        [
            f"{y_title} {row / rows:g}..{(row + 1) / rows:g}",
            *(f"{value:.{digits}f}" if np.isfinite(value) else "" for value in means[row].tolist()),
        ]
        for row in range(rows)
    ]
    return Table(
        caption=f"{title}, averaged over {rows} x {columns} parts ({value_title})",
        columns=(Column(title="", numeric=False), *(Column(title=head) for head in heads)),
        rows=body,
    )


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Calibration of one teacher, or of the ensemble, in equal bins of p_max. Shares are in 0..1."""

    name: str
    crops: tuple[int, ...]
    """Crops in each bin."""
    mean_p_max: tuple[float, ...]
    """Mean p_max in each bin."""
    accuracy: tuple[float, ...]
    """Share of the crops in each bin whose ground truth is named."""
    ece: float
    top1: float


def reliability_chart(curve: Reliability) -> Chart:
    """Draw accuracy over confidence; on the diagonal a teacher is right as often as it says."""
    height, plot = 300, 250
    left = (WIDTH - plot) // 2
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y, x = TOP + plot * (1 - share), left + plot * share
        parts.append(tag("line", x1=left, x2=left + plot, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", f"{100 * share:g} %", x=left - 4, y=y + 4, class_="tick", text_anchor="end"))
        parts.append(tag("text", f"{share:g}", x=x, y=TOP + plot + 14, class_="tick", text_anchor="middle"))
    parts.append(tag("line", x1=left, y1=TOP + plot, x2=left + plot, y2=TOP, class_="diagonal"))
    points = []
    most = max(curve.crops, default=1)
    for crops, p_max, accuracy in zip(curve.crops, curve.mean_p_max, curve.accuracy, strict=True):
        if crops:
            x, y = left + plot * p_max, TOP + plot * (1 - accuracy)
            points.append(f"{x:.1f},{y:.1f}")
            # Areas, not radii, are proportional to the crops.
            parts.append(tag("circle", cx=x, cy=y, r=2.0 + 5 * (crops / most) ** 0.5, class_="dot"))
    parts.append(tag("polyline", points=" ".join(points), class_="curve"))
    parts.append(tag("text", "p_max", x=left + plot / 2, y=height - 8, class_="axis", text_anchor="middle"))
    turned = f"rotate(-90 {left - 40} {TOP + plot / 2:g})"
    parts.append(
        tag("text", "right", x=left - 40, y=TOP + plot / 2, class_="axis", text_anchor="middle", transform=turned)
    )
    title = f"{curve.name}: how often it is right, by p_max"
    rows = [
        [f"{i / len(curve.crops):.2f}-{(i + 1) / len(curve.crops):.2f}", f"{crops:,}", f"{p:.3f}", in_percent(a)]
        for i, (crops, p, a) in enumerate(zip(curve.crops, curve.mean_p_max, curve.accuracy, strict=True))
        if crops
    ]
    columns = (
        Column(title="p_max", numeric=False),
        Column(title="crops"),
        Column(title="mean p_max"),
        Column(title="right", unit="%"),
    )
    return Chart(
        title=curve.name,
        svg=svg(height, parts, title),
        table=Table(caption=title, columns=columns, rows=rows),
        note=f"Right on {percent(curve.top1)} of the crops; expected calibration error {curve.ece:.3f} in 15 bins.",
    )


def boxes_picture(
    picture: str, size: tuple[int, int], boxes: Sequence[tuple[Sequence[int], int, str]], title: str
) -> Markup:
    """Draw an image of `size` (height, width) with boxes: (top, left, height, width), bucket and label of each.

    A box with a label is drawn thick, on top of the others.
    """
    height, width = size
    thick = max(width, height) / 130
    parts = [tag("image", href=picture, x=0, y=0, width=width, height=height)] if picture else []
    if not picture:
        parts.append(tag("rect", x=0, y=0, width=width, height=height, class_="plot"))
    # SVG draws in order: boxes with a label come last, on top.
    for (top, left, box_h, box_w), bucket, label in sorted(boxes, key=lambda box: bool(box[2])):
        # Half of a line lies outside of its rectangle; moved inwards, it stays within the box.
        inset = thick / 2
        common = {
            "x": left + inset, "y": top + inset, "width": max(box_w - thick, 0.5), "height": max(box_h - thick, 0.5),
        }  # fmt: skip
        width_of_line = thick if label else thick / 2.5
        # A dark outline, so that every colour stands out from every photo.
        parts.append(tag("rect", **common, class_="seam", stroke_width=2 * width_of_line))
        parts.append(tag("rect", **common, class_=f"box b{bucket}", stroke_width=width_of_line))
        if label:
            # 0.62 is about the mean width of a digit: SVG cannot measure text without a script.
            font = min(8 * thick, (width - thick) / (0.62 * len(label)))
            wide = font * 0.62 * len(label) + thick
            # At the box's corner, or as near as it can be read.
            x, y = min(left + thick, width - wide), min(top + thick, height - font * 1.15)
            parts.append(tag("rect", x=x, y=y, width=wide, height=font * 1.15, class_=f"flag b{bucket}"))
            parts.append(
                tag("text", label, x=x + thick / 2, y=y + font * 0.9, class_="flagtext",
                    font_size=font)
            )  # fmt: skip
    content = tag("title", escape(title)) + Markup("").join(parts)
    return tag("svg", content, viewBox=f"0 0 {width} {height}", role="img", class_="photo", aria_label=title)
