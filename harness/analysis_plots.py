"""Figures of an analysis, from plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from harness.plots import BASE, EXPERT, GRID, INK, MERGED, heat_map, new_axes, new_figure
from harness.report import SHARES

# Okabe and Ito's colours, then again with other strokes.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#777777")
_STROKES = ("-", "--", ":", "-.")
_WIDE = 20.0  # a range of losses beyond which shades follow their logarithm

Table = Sequence[Sequence[float]]


def layer_names(n_layers: int) -> list[str]:
    """What stands before the blocks, the blocks, what follows.

    >>> layer_names(2)
    ['before', '1', '2', 'after']
    """
    return ["before", *map(str, range(1, n_layers + 1)), "after"]


def opposed(shares: Table, experts: Sequence[str]) -> Figure:
    """Share of the weights that two experts change in opposite directions, (T, T): half is what chance gives."""
    table = [[math.nan if i == j else float(value) for j, value in enumerate(row)] for i, row in enumerate(shares)]
    away = [abs(value - 0.5) for row in table for value in row if not math.isnan(value)]
    most = max([*away, 0.05])
    meaning = "share changed in opposite directions"
    return heat_map(table, experts, experts, Normalize(0.5 - most, 0.5 + most), "RdBu_r", meaning, None, 1.0)


def conflicts(shares: Sequence[float], cancelled: Sequence[float], layers: Sequence[str]) -> Figure:
    """By layer: the weights that experts do not all change in one direction, and how much of the changes cancels."""
    figure = new_figure(min(max(6.5, 2.0 + 0.5 * len(layers)), 16.0), 4.2)
    axes = new_axes(figure)
    told = (
        (shares, "weights with a sign conflict", EXPERT),
        (cancelled, "absolute change that cancels in the sum", MERGED),
    )
    for index, (values, label, colour) in enumerate(told):
        places = [place + 0.42 * (index - 0.5) for place in range(len(layers))]
        drawn = axes.bar(places, [100 * value for value in values], 0.4, color=colour, label=label, zorder=2)
        if len(layers) <= 12:
            axes.bar_label(drawn, fmt="%.0f", fontsize=8, color=INK, padding=2)
    _layers(axes, layers)
    axes.set(ylabel="share in %", ylim=(0, 108))
    axes.grid(axis="y", color=GRID, zorder=0)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def by_layer(table: Table, layers: Sequence[str], experts: Sequence[str], meaning: str) -> Figure:
    """A share of each expert in each layer, experts across, in per cent of what `meaning` says."""
    parts = [[100 * value for value in row] for row in table]
    norm = Normalize(0.0, max([value for row in parts for value in row if not math.isnan(value)] + [1e-12]))
    figure = heat_map(parts, experts, layers, norm, "viridis", meaning, None, None)
    figure.axes[0].set_ylabel("layer")
    return figure


def energies(curves: Mapping[str, Sequence[float]]) -> Figure:
    """How much of the changes' squared norm the leading directions hold, a curve for each expert."""
    figure = new_figure(7.5, 4.6)
    axes = new_axes(figure)
    for index, (expert, curve) in enumerate(curves.items()):
        across = [100 * place / (len(curve) - 1) for place in range(len(curve))]
        axes.plot(across, [100 * value for value in curve], label=expert, **_stroke(index))
    axes.plot([0, 100], [0, 100], color=BASE, linewidth=1, linestyle=":", label="all directions alike")
    axes.set(
        xlabel="leading singular directions in %", ylabel="squared norm they hold in %", xlim=(0, 100), ylim=(0, 102)
    )
    _ready(figure, axes)
    return figure


def line(rows: Sequence[Mapping[str, Any]], ends: tuple[str, str]) -> Figure:
    """Losses, and where the tasks share a metric scores, along a line between two models.

    Args:
        rows: Each with t, task, loss, metric, value.
        ends: What stands at t = 0 and at t = 1.
    """
    metrics = {row["metric"] for row in rows}
    panels = [("loss", "loss in nats", 1)]
    if len(metrics) == 1 and next(iter(metrics)) != "perplexity":
        metric = next(iter(metrics))
        panels.append(("value", f"{metric.replace('_', ' ')} in %" if metric in SHARES else metric, 100))
    figure = new_figure(6.2 * len(panels) + 1.2, 4.4)
    for index, (key, title, factor) in enumerate(panels, start=1):
        axes = _panel(figure, len(panels), index)
        _lines(axes, rows, key, factor)
        axes.set(xlabel=f"from {ends[0]} (0) to {ends[1]} (1)", ylabel=title)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = math.ceil(len(labels) / math.ceil(len(labels) / 5))  # rows of equal length
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return figure


def _lines(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, factor: float) -> None:
    """A line for each task, and their mean."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    sums: dict[float, list[float]] = {}
    for index, task in enumerate(tasks):
        own = [row for row in rows if row["task"] == task]
        axes.plot([row["t"] for row in own], [factor * row[key] for row in own], label=task, **_stroke(index))
        for row in own:
            sums.setdefault(row["t"], []).append(factor * row[key])
    if len(tasks) > 1:
        means = [math.fsum(values) / len(values) for values in sums.values()]
        axes.plot(list(sums), means, color=INK, linewidth=3, label="mean")


def plane(
    table: Table, sides: Sequence[float], experts: tuple[str, str], meaning: str, *, rising: bool = False
) -> Figure:
    """A number over the plane of two task vectors: base at (0, 0), the experts at (1, 0) and (0, 1).

    Args:
        table: Rows along the second expert's coefficient, columns along the first's.
        sides: The coefficients.
        experts: First and second.
        meaning: What the number is.
        rising: The more the better.
    """
    figure = new_figure(6.8, 5.4)
    axes = new_axes(figure)
    flat = [value for row in table for value in row if math.isfinite(value)]
    low, high = min(flat), max(flat)
    logarithmic = not rising and low > 0 and high / low > _WIDE
    norm: Normalize = LogNorm(low, high) if logarithmic else Normalize(low, high if high > low else low + 1e-12)
    shades = colormaps["viridis" if rising else "viridis_r"]
    step = sides[1] - sides[0]
    edges = [sides[0] - step / 2, sides[-1] + step / 2]
    extent = (edges[0], edges[1], edges[0], edges[1])
    image = axes.imshow(table, norm=norm, cmap=shades, origin="lower", extent=extent, interpolation="nearest")
    if high > low:
        axes.contour(sides, sides, table, 8, colors="white", linewidths=0.7, alpha=0.7, norm=norm)
    places = {"base": (0, 0), experts[0]: (1, 0), experts[1]: (0, 1), "sum": (1, 1)}
    for name, (x, y) in places.items():
        if edges[0] <= x <= edges[1] and edges[0] <= y <= edges[1]:
            axes.plot(x, y, "o", color=EXPERT, markeredgecolor=INK, markersize=8)
            axes.annotate(
                name, (x, y), (6, 6), textcoords="offset points", fontsize=9, color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5},
            )  # fmt: skip
    axes.set(xlabel=f"times the change of {experts[0]}", ylabel=f"times the change of {experts[1]}")
    figure.colorbar(image, ax=axes, label=meaning, fraction=0.045, pad=0.02).outline.set_visible(False)
    return figure


def _panel(figure: Figure, n: int, index: int) -> Axes:
    """One of several axes side by side."""
    axes = figure.add_subplot(1, n, index)
    axes.tick_params(colors=INK, labelsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def _stroke(index: int) -> dict[str, Any]:
    """A line's look, told apart from the others'."""
    colour, stroke = _COLOURS[index % len(_COLOURS)], _STROKES[index // len(_COLOURS) % len(_STROKES)]
    return {"color": colour, "linestyle": stroke, "linewidth": 1.8}


def _layers(axes: Axes, layers: Sequence[str]) -> None:
    """Names of layers under an axis, not all where there are many."""
    every = max(1, len(layers) // 24)
    axes.set_xticks(range(0, len(layers), every), layers[::every])
    axes.set_xlabel("layer")


def _ready(figure: Figure, axes: Axes) -> None:
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, ncols=2 if len(axes.lines) > 6 else 1)
