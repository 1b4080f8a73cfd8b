"""Figures of what is learnt: the loss and the coefficients by step, and whom routers send examples to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.plots import GRID, MERGED, heat_map, new_axes, new_figure, shades

MOST_NAMED = 10  # coefficients up to which each has a colour and a name


def learning_curve(
    losses: Sequence[float],
    title: str = "",
    what: str = "loss in nats",
    coefficients: Sequence[Sequence[float]] = (),
    experts: Sequence[str] = (),
    best: bool = False,
) -> Figure:
    """The loss by step with its running mean over a twentieth of all, and beside it the coefficients, if there are any.

    Args:
        losses: One for each step.
        title: What was learnt.
        what: What the losses are.
        coefficients: For each step each expert's, the mean over groups.
        experts: Their names.
        best: Whether the step with the least loss is what is kept: then that of the steps so far is drawn over each.
    """
    figure = new_figure(12.5 if coefficients else 7.5, 4.4)
    axes = new_axes(figure, 1, 2 if coefficients else 1, 1)
    steps = range(1, len(losses) + 1)
    window = max(1, len(losses) // 20)
    kept = _least_so_far(losses) if best else []
    plain = not kept and window == 1
    axes.plot(steps, losses, color=MERGED, alpha=1.0 if plain else 0.35, linewidth=1.4, label="each step")
    if kept:
        axes.plot(steps, [losses[step] for step in kept], color=MERGED, linewidth=2.2, label="least so far")
    elif window > 1:
        means = [sum(losses[max(0, end - window) : end]) / min(end, window) for end in steps]
        axes.plot(steps, means, color=MERGED, linewidth=2.2, label=f"mean of {window} steps")
    if not plain:
        axes.legend(frameon=False, fontsize=10)
    _finish(axes, what, f"{title}: loss" if title else "")
    if coefficients:
        _courses(new_axes(figure, 1, 2, 2), coefficients, experts, title, kept)
    return figure


def _least_so_far(losses: Sequence[float]) -> list[int]:
    """For each step the one with the least loss up to it."""
    found = [0]
    for step in range(1, len(losses)):
        found.append(step if losses[step] < losses[found[-1]] else found[-1])
    return found


def _courses(
    axes: Axes, coefficients: Sequence[Sequence[float]], experts: Sequence[str], title: str, kept: Sequence[int]
) -> None:
    """Each expert's coefficient by step."""
    steps = range(1, len(coefficients) + 1)
    few = len(experts) <= MOST_NAMED
    colours = colormaps["tab10" if few else "viridis"]
    for index, (name, course) in enumerate(zip(experts, zip(*coefficients, strict=True), strict=True)):
        shade = colours(index if few else index / len(experts))
        if kept:
            axes.plot(steps, course, color=shade, linewidth=1.0, alpha=0.25)
        shown = [course[step] for step in kept] or course
        axes.plot(steps, shown, color=shade, linewidth=1.8, label=name)
    if len(experts) <= 2 * MOST_NAMED:
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _finish(axes, "coefficient, mean over groups", f"{title}: coefficients" if title else "")


def _finish(axes: Axes, what: str, title: str) -> None:
    axes.set(xlabel="step", ylabel=what)
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(color=GRID)
    axes.set_axisbelow(True)


def routing(rows: Sequence[Mapping[str, Any]], experts: Sequence[str], title: str = "") -> Figure:
    """Whom each task's examples are sent to: the mean gate of each expert, over the examples and all routers.

    Args:
        rows: Each with task, expert and mean, as `routing.json` has them.
        experts: Names, across.
        title: What routes.
    """
    gates: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        gates.setdefault((row["task"], row["expert"]), []).append(row["mean"])
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    means = {key: sum(found) / len(found) for key, found in gates.items()}
    table = [[means.get((task, expert), math.nan) for expert in experts] for task in tasks]
    n = len({row["router"] for row in rows})
    meaning = "mean gate" + (f" of {n} routers" if n > 1 else "")
    figure = heat_map(table, experts, tasks, *shades(table), meaning, "expert", None)
    axes = figure.axes[0]
    axes.set_ylabel("examples of")
    axes.set_title(title, fontsize=11, loc="left")
    return figure
