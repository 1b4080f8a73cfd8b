"""Figures of a run's results, from plain numbers; matplotlib's object interface, no global state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.projections.polar import PolarAxes

from harness.report import SHARES, share

# Okabe and Ito's colours, told apart with any colour vision; black on white in print, too.
MERGED, EXPERT, BASE = "#0072B2", "#E69F00", "#999999"
INK, GRID = "#222222", "#DDDDDD"
_SERIES = (("base", "base", BASE), ("value", "merged", MERGED), ("expert", "own expert", EXPERT))
MOST_ANNOTATED = 10  # tasks up to which a bar has room for its number
MOST_CELLS = 220  # cells up to which a heat map has room for its numbers


def new_figure(width: float, height: float) -> Figure:
    """A white figure, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    cast(ConstrainedLayoutEngine, figure.get_layout_engine()).set(w_pad=0.12, h_pad=0.08)  # inches
    FigureCanvasAgg(figure)
    return figure


def new_axes(figure: Figure, *where: int, **how: Any) -> Axes:
    """Axes without the box around them."""
    axes = figure.add_subplot(*where, **how)
    axes.tick_params(colors=INK, labelsize=10)
    for side in ("top", "right"):
        if side in axes.spines:
            axes.spines[side].set_visible(False)
    return axes


def _known(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The series of which there are numbers: (key, label, colour)."""
    return [each for each in _SERIES if any(row.get(each[0]) is not None for row in results)]


def _percents(results: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [math.nan if row.get(key) is None else 100 * row[key] for row in results]


def comparable(results: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Rows whose numbers can stand on one axis, and what they are.

    Scores of one metric that is a share stand as they are. Others are each divided by the own expert's, or the expert's
    by them where lower is better; tasks without an expert are left out then.
    """
    metrics = {row["metric"] for row in results}
    if len(metrics) == 1 and metrics <= set(SHARES):
        return [dict(row) for row in results], next(iter(metrics))
    known = [row for row in results if row["normalized"] is not None]
    return [
        {
            "task": row["task"],
            "value": row["normalized"],
            "expert": 1.0,
            "base": share(row["metric"], row["base"], row["expert"]),
        }
        for row in known
    ], "normalized"


def bars(results: Sequence[Mapping[str, Any]], what: str = "accuracy") -> Figure:
    """A share for each task: merged beside the base and the task's own expert.

    Args:
        results: Rows with `task`, `value` and, where known, `expert` and `base`, of `comparable`.
        what: What the numbers are: accuracy, exact_match, normalized.
    """
    series = _known(results)
    n = len(results)
    figure = new_figure(min(max(7.0, 1.6 + 1.05 * n), 16.0), 5.0)
    axes = new_axes(figure)
    width = 0.84 / len(series)
    for index, (key, label, colour) in enumerate(series):
        heights = _percents(results, key)
        places = [place + (index - (len(series) - 1) / 2) * width for place in range(n)]
        drawn = axes.bar(places, heights, width * 0.94, label=label, color=colour, zorder=2)
        if n <= MOST_ANNOTATED:
            axes.bar_label(drawn, fmt="%.0f", fontsize=8, color=INK, padding=2)
    mean = sum(_percents(results, "value")) / n
    axes.axhline(mean, color=MERGED, linewidth=1.2, linestyle="--", zorder=1, label=f"merged, average {mean:.1f} %")
    _task_labels(axes, [str(row["task"]) for row in results])
    top = _top(results)
    axes.set(ylabel=_title(what), ylim=(0, 1.08 * top), xlim=(-0.6, n - 0.4), yticks=range(0, top + 1, top // 5))
    axes.grid(axis="y", color=GRID, zorder=0)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: "average" in labels[index])  # the line last
    chosen = [handles[index] for index in order], [labels[index] for index in order]
    figure.legend(*chosen, loc="outside upper center", ncols=len(order), frameon=False, fontsize=10)
    return figure


def _title(what: str) -> str:
    return "score in % of the own expert's" if what == "normalized" else f"{what.replace('_', ' ')} in %"


def _top(results: Sequence[Mapping[str, Any]]) -> int:
    """Where an axis of percentages ends: at 100, or above the highest number."""
    highest = max(
        value for key in ("value", "expert", "base") for value in [*_percents(results, key), 0] if value == value
    )
    return max(100, 20 * math.ceil(highest / 20)) if highest <= 200 else 100 * math.ceil(highest / 100)


def _task_labels(axes: Axes, names: Sequence[str]) -> None:
    """Names under an axis, turned when they would touch."""
    longest = max(map(len, names))
    turned = longest > 9 or (longest > 3 and len(names) > 12)
    axes.set_xticks(range(len(names)), names, rotation=40 if turned else 0, ha="right" if turned else "center")
    if turned:
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")


def radar(results: Sequence[Mapping[str, Any]], what: str = "accuracy") -> Figure:
    """The same numbers as closed lines, one spoke for each task; with fewer than three tasks, bars."""
    if len(results) < 3:
        return bars(results, what)
    size = 7.0 if len(results) <= MOST_ANNOTATED else 8.6
    figure = new_figure(size, 0.94 * size)
    axes = cast(PolarAxes, new_axes(figure, projection="polar"))
    angles = [2 * math.pi * index / len(results) for index in range(len(results))]
    styles = {"base": ":", "expert": "--", "value": "-"}
    for key, label, colour in _known(results):
        values = _percents(results, key)
        axes.plot([*angles, angles[0]], [*values, values[0]], styles[key], color=colour, label=label, linewidth=2.2)
        if key == "value":
            axes.fill(angles, values, color=colour, alpha=0.15)
    top = _top(results)
    ticks = range(top // 5, top + 1, top // 5)
    axes.set(theta_offset=math.pi / 2, theta_direction=-1, ylim=(0, top), yticks=ticks)
    axes.set_yticklabels([f"{tick} %" for tick in ticks], fontsize=8, color="#666666")
    axes.set_rlabel_position(180 / len(results))
    axes.set_xticks(angles, [str(row["task"]) for row in results])
    for text, angle in zip(axes.get_xticklabels(), angles, strict=True):
        across = math.sin(angle)
        text.set_horizontalalignment("center" if abs(across) < 0.15 else "left" if across > 0 else "right")
    axes.tick_params(axis="x", pad=4)
    axes.grid(color=GRID)
    axes.spines["polar"].set_color(GRID)
    title = None if what == "accuracy" else _title(what)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10, title=title)
    return figure


def coefficients(values: Mapping[str, Iterable[float]], experts: Sequence[str]) -> Figure:
    """Merging coefficients, experts across and layers (or tensors) down, first to last.

    Args:
        values: Layer (or another group of tensors) -> one coefficient for each expert.
        experts: Names of the experts, in the order of the coefficients.
    """
    table = [[float(value) for value in row] for row in values.values()]
    norm, colours = shades(table)
    return heat_map(table, experts, _shorn(list(values)), norm, colours, "merging coefficient", None, None)


def shades(table: Sequence[Sequence[float]]) -> tuple[Normalize, str]:
    """From numbers to colours: one hue from 0 up, two where some are below 0; and the colour map's name."""
    flat = [value for row in table for value in row if not math.isnan(value)]
    if min(flat) < 0:
        most = max(map(abs, flat))
        return TwoSlopeNorm(0, -most, most), "RdBu_r"
    return Normalize(0.0, max([*flat, 1e-12])), "viridis"


def _shorn(names: list[str]) -> list[str]:
    """Dotted names without the parts that all begin with."""
    parts = [name.split(".") for name in names]
    same = [len(set(column)) == 1 for column in zip(*parts, strict=False)]
    shared = same.index(False) if False in same else 0
    return [".".join(part[min(shared, len(part) - 1) :]) for part in parts]


def similarity(cosines: Sequence[Sequence[float]], experts: Sequence[str]) -> Figure:
    """Cosine similarity of the task vectors, (T, T): what lies near 0 interferes little."""
    others = [abs(value) for i, row in enumerate(cosines) for j, value in enumerate(row) if i != j]
    most = max(others, default=1.0) or 1.0
    table = [[math.nan if i == j else float(value) for j, value in enumerate(row)] for i, row in enumerate(cosines)]
    norm = TwoSlopeNorm(0, -most, most)
    return heat_map(table, experts, experts, norm, "RdBu_r", "cosine similarity of task vectors", None, 1.0)


def heat_map(
    table: Sequence[Sequence[float]],
    columns: Sequence[str],
    rows: Sequence[str],
    norm: Normalize,
    colours: str,
    meaning: str,
    across: str | None,
    aspect: float | None,
) -> Figure:
    """Cells in colours, with their numbers where there is room.

    Args:
        table: Rows of cells; NaN is left grey.
        columns: Names across.
        rows: Names down.
        norm: From numbers to shades.
        colours: A colour map's name.
        meaning: What the numbers are.
        across: Title of the columns.
        aspect: Of a cell; None: as wide as fits.
    """
    tall = 0.46 if len(rows) <= 20 else 0.2
    figure = new_figure(max(6.5, 2.6 + 0.75 * len(columns)), max(3.2, 1.8 + tall * len(rows)))
    axes = new_axes(figure)
    if len(rows) > 20:
        axes.tick_params(axis="y", labelsize=7)
    shades = colormaps[colours].with_extremes(bad="#F0F0F0")
    image = axes.imshow(table, norm=norm, cmap=shades, aspect=aspect or "auto")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_yticks(range(len(rows)), rows)
    _task_labels(axes, [str(column) for column in columns])
    axes.tick_params(length=0)
    if across:
        axes.set_xlabel(across)
    if len(rows) * len(columns) <= MOST_CELLS:
        _annotate(axes, table, image)
    figure.colorbar(image, ax=axes, label=meaning, fraction=0.04, pad=0.02).outline.set_visible(False)
    return figure


def _annotate(axes: Axes, table: Sequence[Sequence[float]], image: Any) -> None:
    """Each cell's number, dark on light and light on dark."""
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if math.isnan(value):
                continue
            red, green, blue, _ = image.cmap(image.norm(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            axes.text(
                x,
                y,
                f"{value:.2f}".replace("-0.00", "0.00"),
                ha="center",
                va="center",
                fontsize=8,
                color=INK if light else "white",
            )


def ranking(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """Methods from the best at the top, with their intervals.

    Args:
        rows: Each with method, mean, low and high; low and high may be None.
        metric: What the numbers are, such as `average/accuracy`.
    """
    figure = new_figure(7.5, 1.2 + 0.26 * len(rows))
    axes = new_axes(figure)
    factor = 100 if metric.rpartition("/")[2] in (*SHARES, "normalized") else 1
    means = [factor * row["mean"] for row in rows]
    low, high = ([factor * (row["mean"] if row[end] is None else row[end]) for row in rows] for end in ("low", "high"))
    spans = [
        [
            max(mean - end, 0.0) for mean, end in zip(means, low, strict=True)
        ],  # of further seeds: the mean may lie outside
        [max(end - mean, 0.0) for mean, end in zip(means, high, strict=True)],
    ]
    axes.errorbar(means, range(len(rows)), xerr=spans, fmt="o", color=MERGED, ecolor=BASE, capsize=2, markersize=4)
    axes.set_yticks(range(len(rows)), [str(row["method"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(metric.replace("/", " ") + (" in %" if factor == 100 else "") + ", 95 % interval")
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    return figure
