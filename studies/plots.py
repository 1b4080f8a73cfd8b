"""Plots of a study by optuna.visualization: a PNG of each, and one page of HTML with all of them to hover over.

With harness/plots.py this is the gate to matplotlib; plotly draws the page.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

MOST = {"slice": 6, "contour": 4, "rank": 4, "parallel_coordinate": 8}  # parameters that a plot has room for
_TITLES = {
    "history": "Value of each trial, and the best so far",
    "importances": "How much each parameter matters (PED-ANOVA)",
    "slice": "Value over each parameter",
    "contour": "Value over pairs of parameters",
    "rank": "Rank of the value over pairs of parameters",
    "parallel_coordinate": "Parallel coordinates",
    "pareto_front": "Pareto front",
    "timeline": "When each trial ran",
    "intermediate_values": "Values on the way, which pruning looks at",
}
_SIZES: dict[str, Callable[[int], tuple[float, float]]] = {  # inches, by the number of parameters
    "contour": lambda n: (2.6 * n + 1.5, 2.4 * n) if n > 2 else (8.0, 6.0),
    "rank": lambda n: (2.8 * n + 1.5, 2.5 * n),
    "slice": lambda n: (max(6.0, 2.6 * n + 1.5), 4.2),
    "parallel_coordinate": lambda n: (max(8.0, 1.7 * (n + 1)), 5.5),
    "importances": lambda n: (8.5, 1.6 + 0.36 * n),
}
_FUNCTIONS = {"history": "plot_optimization_history", "importances": "plot_param_importances"}


@dataclass(frozen=True)
class Plot:
    """One plot in both forms."""

    name: str  # of its file, without the ending: contour, or contour.worst_accuracy
    title: str
    still: Figure
    moving: Any  # plotly's figure


@dataclass
class Drawn:
    """What was drawn, and what was not: name -> why."""

    plots: list[Plot] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    prefix: str = ""  # what all parameters' names begin with, left out on the plots


def draw(study: optuna.Study, metrics: Sequence[str]) -> Drawn:
    """Every plot that applies to a study; parameters go by their names less what all begin with.

    Args:
        study: With any number of trials.
        metrics: What its objectives are, in their order.
    """
    drawn = Drawn(prefix=_shared(_names(study)))
    with _off_screen():
        for index, metric in enumerate(metrics):
            single = _single(study, index, len(drawn.prefix))
            values = [trial.value for trial in _complete(single)]
            known = importances(single)
            chosen = sorted(varied(single), key=lambda name: -known.get(name, 0.0))
            of = metric if len(metrics) > 1 else None
            for name in ("history", "importances", *MOST):
                _add(drawn, single, name, of, _why_not(name, values, chosen), _given(name, metric, chosen))
        _add_others(drawn, study, metrics)
    return drawn


def _add_others(drawn: Drawn, study: optuna.Study, metrics: Sequence[str]) -> None:
    """Plots of the study as a whole."""
    if len(metrics) > 1:
        why = _no_front(study, metrics)
        _add(drawn, study, "pareto_front", None, why, {"target_names": list(metrics)})
    else:
        reported = any(trial.intermediate_values for trial in study.trials)
        _add(drawn, study, "intermediate_values", None, None if reported else "no trial reported on the way", {})
    begun = any(trial.datetime_start for trial in study.trials)
    _add(drawn, study, "timeline", None, None if begun else "no trial has begun", {})


def _single(study: optuna.Study, index: int, skip: int) -> optuna.Study:
    """The study of one objective alone, in memory, with shorter names: Optuna's plots then know which way is better."""
    import optuna

    single = optuna.create_study(direction=study.directions[index])
    for trial in study.get_trials(states=tuple(state for state in optuna.trial.TrialState if state.is_finished())):
        trial.values = [trial.values[index]] if trial.values else None
        trial.distributions = {name[skip:]: each for name, each in trial.distributions.items()}
        trial.params = {name[skip:]: value for name, value in trial.params.items()}
        single.add_trial(trial)
    return single


def _names(study: optuna.Study) -> list[str]:
    return list(dict.fromkeys(name for trial in study.get_trials(deepcopy=False) for name in trial.params))


def _shared(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot or a slash.

    >>> _shared(["method.scale/layer 0", "method.scale/layer 1"]), _shared(["method", "method.scale"])
    ('method.scale/', '')
    """
    if len(names) < 2:
        return ""
    least, most = min(names), max(names)  # what these two share, all share
    length = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
    return least[: max(least.rfind(".", 0, length), least.rfind("/", 0, length)) + 1]


def page(drawn: Drawn, title: str) -> str:
    """All plots as one HTML document that needs no network."""
    from plotly.offline import get_plotlyjs

    parts = [
        f"<h2>{escape(plot.title)}</h2>\n<section>"
        + plot.moving.to_html(full_html=False, include_plotlyjs=False, default_height=f"{_height(plot)}px")
        + "</section>"
        for plot in drawn.plots
    ]
    missing = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in drawn.left_out.items())
    left_out = f"<h2>Left out</h2><ul>{missing}</ul>" if missing else ""
    style = (
        "body{font-family:sans-serif;margin:1.5em;color:#222}"
        "h2{font-size:1.1em;margin:1.5em 0 0}section{overflow-x:auto}"  # plots of many parameters are wide
    )
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
        f"<script>{get_plotlyjs()}</script></head><body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + f"{left_out}</body></html>"
    )


def varied(study: optuna.Study) -> list[str]:
    """Parameters with more than one value among the complete trials."""
    seen: dict[str, set[str]] = {}
    for trial in _complete(study):
        for name, value in trial.params.items():
            seen.setdefault(name, set()).add(repr(value))
    return [name for name, values in seen.items() if len(values) > 1]


def importances(study: optuna.Study, index: int = 0) -> dict[str, float]:
    """Share of each varied parameter in how an objective's values differ, greatest first; {} if unknown.

    Args:
        study: With any number of trials.
        index: Of the objective.
    """
    import optuna

    if len(study.directions) > 1:
        study = _single(study, index, 0)
    names = varied(study)
    if not names or len({trial.value for trial in _complete(study)}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some regimes for parameter")  # a study of few trials has nothing better
        found = optuna.importance.get_param_importances(study, params=names)
    return {name: share for name, share in found.items() if share == share}


def _add(
    drawn: Drawn, study: optuna.Study, name: str, of: str | None, why_not: str | None, how: dict[str, Any]
) -> None:
    """Draw a plot, or note why not; one that fails costs itself only, not the report.

    Args:
        drawn: Where it goes.
        study: What is drawn.
        name: Of the plot.
        of: The objective, where there are several.
        why_not: Why it does not apply; None where it does.
        how: Arguments of Optuna's function.
    """
    import optuna.visualization
    import optuna.visualization.matplotlib

    file = name if of is None else f"{name}.{of.replace('/', '_')}"
    if why_not is not None:
        drawn.left_out[file] = why_not
        return
    function = _FUNCTIONS.get(name, f"plot_{name}")
    try:
        moving = getattr(optuna.visualization, function)(study, **how)
        still = _still(name, getattr(optuna.visualization.matplotlib, function), study, how)
    except Exception as error:  # whatever Optuna raises is named in the report
        drawn.left_out[file] = f"Optuna could not draw it: {type(error).__name__}: {error}"
        return
    title = _TITLES[name] if of is None else f"{_TITLES[name]}: {of}"
    drawn.plots.append(Plot(file, title, still, moving))


def _why_not(name: str, values: Sequence[float], chosen: Sequence[str]) -> str | None:
    """Why a plot of one objective does not apply; None where it does."""
    if name == "history":
        return None if values else "no trial is complete"
    if len(values) < 2:
        return f"it needs two complete trials, there {'is one' if values else 'is none'}"
    least = {"importances": 2, "contour": 2, "rank": 2}.get(name, 1)
    if len(chosen) < least:
        return f"it needs {_count(least)}, there {'is one' if chosen else 'is none'}"
    if len(set(values)) < 2 and name in ("importances", "contour", "rank"):
        return "all trials have the same value"
    return None


def _count(least: int) -> str:
    return "1 parameter that varies" if least == 1 else f"{least} parameters that vary"


def _no_front(study: optuna.Study, metrics: Sequence[str]) -> str | None:
    if len(metrics) > 3:
        return "it shows at most three objectives"
    return None if _complete(study) else "no trial is complete"


def _given(name: str, metric: str, chosen: list[str]) -> dict[str, Any]:
    """Arguments of a plot of one objective: its name, and the most important parameters that there is room for."""
    how: dict[str, Any] = {"target_name": metric}
    return how if name == "history" else how | {"params": chosen[: MOST.get(name, 20)]}


def _still(name: str, function: Callable[..., Any], study: optuna.Study, how: dict[str, Any]) -> Figure:
    """A plot by matplotlib, in a size at which it can be read."""
    import matplotlib

    with matplotlib.rc_context({"figure.constrained_layout.use": name != "timeline"}):  # most of them set a style
        drawn = function(study, **how)
        axes = list(drawn.flat) if hasattr(drawn, "flat") else [drawn]
        figure = axes[0].figure
        n = len(how.get("params", ()))
        width, height = _SIZES.get(name, lambda n: (9.0, 5.0))(n)
        figure.set_size_inches(width, height)
        if name == "intermediate_values" and axes[0].get_legend() is not None:
            axes[0].get_legend().remove()  # a line for each trial
        figure.set_layout_engine("tight" if name == "timeline" else "constrained")
        for each in axes:
            _tidy(each, outer=name == "contour" and len(axes) > 1)
    return figure


def _tidy(axes: Any, outer: bool) -> None:
    """Names on an axis are turned, so that they do not touch; inner panels leave labels to the outer ones."""
    for label in axes.get_xticklabels():
        if any(letter.isalpha() for letter in label.get_text()):
            label.set(rotation=25, ha="right", rotation_mode="anchor")
    if outer:
        axes.label_outer()


def _height(plot: Plot) -> int:
    """Pixels of a plot on the page."""
    kind = plot.name.partition(".")[0]
    return 900 if kind in ("contour", "rank") and len(plot.still.axes) > 5 else 520


def _complete(study: optuna.Study) -> list[Any]:
    import optuna

    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


@contextmanager
def _off_screen() -> Iterator[None]:
    """Optuna draws through pyplot: it gets a canvas, and is given back as it was; warnings of youth go unsaid."""
    import matplotlib
    import optuna
    from matplotlib import pyplot

    before = pyplot.get_backend()
    pyplot.switch_backend("Agg")
    open_before = set(pyplot.get_fignums())
    try:
        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", "Some regimes for parameter")
            warnings.filterwarnings("ignore", "Contour plot will not be displayed")  # of two parameters never met
            yield
    finally:
        for number in set(pyplot.get_fignums()) - open_before:
            pyplot.close(number)  # the figures live on, pyplot forgets them
        pyplot.switch_backend(before)
