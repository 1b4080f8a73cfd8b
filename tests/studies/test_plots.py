from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import optuna
import pytest
from matplotlib import pyplot
from PIL import Image

from studies.plots import MOST, draw, importances, page, varied

ONE = ["history", "importances", *MOST]


def study_of(n: int, metrics: int = 1, seed: int = 0, steps: int = 0) -> optuna.Study:
    """Trials on a bowl: the density hardly matters, the scale does, `fixed` never varies."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize"] * metrics, sampler=optuna.samplers.RandomSampler(seed))

    def objective(trial: optuna.Trial) -> list[float]:
        scale, density = trial.suggest_float("method.scale", 0, 1), trial.suggest_float("method.density", 0.1, 1)
        trial.suggest_float("method.fixed", 1, 1)
        for step in range(steps):
            trial.report(scale + step, step)
        best = 1 - (scale - 0.4) ** 2 - 0.01 * density
        return [best, 1 - (scale - 0.8) ** 2, density][:metrics]

    study.optimize(objective, n_trials=n)
    return study


class _Divs(HTMLParser):
    """Counts plots and headings, and what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.plots, self.headings, self.foreign = 0, 0, []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.plots += "plotly-graph-div" in (given.get("class") or "")
        self.headings += tag == "h2"
        self.foreign += [value for key, value in attrs if key in ("src", "href") and (value or "").startswith("http")]


def test_every_plot_of_a_single_objective_is_drawn_and_can_be_written(tmp_path: Path) -> None:
    drawn = draw(study_of(12, steps=3), ["average/accuracy"])
    assert [plot.name for plot in drawn.plots] == [*ONE, "intermediate_values", "timeline"]
    assert drawn.left_out == {}
    for plot in drawn.plots:
        plot.still.savefig(tmp_path / "plot.png", dpi=40)
        with Image.open(tmp_path / "plot.png") as image:
            assert min(image.size) > 60
            assert len(image.convert("L").getcolors() or []) > 8, f"{plot.name} is blank"


def test_several_objectives_have_plots_each_and_a_front() -> None:
    drawn = draw(study_of(8, metrics=2), ["average/accuracy", "worst/accuracy"])
    names = [plot.name for plot in drawn.plots]
    assert names == [
        *(f"{name}.average_accuracy" for name in ONE),
        *(f"{name}.worst_accuracy" for name in ONE),
        "pareto_front",
        "timeline",
    ]
    history = next(plot for plot in drawn.plots if plot.name == "history.worst_accuracy")
    best = history.still.axes[0].get_lines()[0].get_ydata()
    assert list(best) == sorted(best), "the best so far rises where more is better"


def test_a_front_of_four_objectives_is_left_out() -> None:
    study = optuna.create_study(directions=["maximize"] * 4)
    study.optimize(lambda trial: [trial.suggest_float("x", 0, 1)] * 4, n_trials=1)
    drawn = draw(study, ["a", "b", "c", "d"])
    assert drawn.left_out["pareto_front"] == "it shows at most three objectives"


@pytest.mark.parametrize(
    ("trials", "why"),
    [(0, "it needs two complete trials, there is none"), (1, "it needs two complete trials, there is one")],
)
def test_what_too_few_trials_cannot_show_is_left_out_with_its_reason(trials: int, why: str) -> None:
    drawn = draw(study_of(trials), ["average/accuracy"])
    assert [plot.name for plot in drawn.plots] == (["history", "timeline"] if trials else [])
    assert {drawn.left_out[name] for name in ONE if name != "history"} == {why}


def test_a_parameter_that_never_varies_is_not_drawn() -> None:
    study = study_of(6)
    assert varied(study) == ["method.scale", "method.density"]
    constant = optuna.create_study()
    constant.optimize(lambda trial: trial.suggest_float("x", 2, 2) + trial.number, n_trials=3)
    drawn = draw(constant, ["time/merge_s"])
    assert [plot.name for plot in drawn.plots] == ["history", "timeline"]
    assert drawn.left_out["slice"] == "it needs 1 parameter that varies, there is none"
    assert drawn.left_out["contour"] == "it needs 2 parameters that vary, there is none"


def test_equal_values_have_no_importances_and_no_contours() -> None:
    study = optuna.create_study(direction="maximize")

    def objective(trial: optuna.Trial) -> float:
        return 0.5 * (trial.suggest_float("x", 0, 1) < 2) * (trial.suggest_float("y", 0, 1) < 2)

    study.optimize(objective, n_trials=4)
    drawn = draw(study, ["average/accuracy"])
    assert {drawn.left_out[name] for name in ("importances", "contour", "rank")} == {"all trials have the same value"}
    assert importances(study) == {}


def test_failed_and_pruned_trials_and_conditional_parameters_are_no_obstacle() -> None:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))

    def objective(trial: optuna.Trial) -> float:
        method = trial.suggest_categorical("method", ["ties", "dare"])
        value = trial.suggest_float(f"{method}.density", 0.1, 1)
        trial.report(value, 0)
        if trial.number == 2:
            raise ValueError("not a number")
        if trial.number == 3:
            raise optuna.TrialPruned
        return value

    study.optimize(objective, n_trials=12, catch=(ValueError,))
    drawn = draw(study, ["average/accuracy"])
    assert [plot.name for plot in drawn.plots] == [*ONE, "intermediate_values", "timeline"]
    assert drawn.prefix == "", "`method` and `ties.density` begin with nothing in common"


def test_many_coefficients_are_cut_to_the_most_important_and_named_in_short() -> None:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial: optuna.Trial) -> float:
        found = [trial.suggest_float(f"method.weights/digits/layer {layer}", 0, 1) for layer in range(12)]
        return -math.fsum((value - 0.5) ** 2 * (10 if layer == 7 else 0.1) for layer, value in enumerate(found))

    study.optimize(objective, n_trials=30)
    drawn = draw(study, ["average/accuracy"])
    assert drawn.prefix == "method.weights/digits/"
    sliced = next(plot for plot in drawn.plots if plot.name == "slice")
    labels = [axes.get_xlabel() for axes in sliced.still.axes if axes.get_xlabel()]
    assert "layer 7" in labels
    assert len(labels) == MOST["slice"]
    assert max(importances(study), key=importances(study).__getitem__) == "method.weights/digits/layer 7"


def test_importances_follow_each_objective() -> None:
    study = study_of(40, metrics=3)
    assert max(importances(study, 1), key=importances(study, 1).__getitem__) == "method.scale"
    assert max(importances(study, 2), key=importances(study, 2).__getitem__) == "method.density"


def test_the_page_holds_every_plot_and_loads_nothing() -> None:
    drawn = draw(study_of(6), ["average/accuracy"])
    found = _Divs()
    found.feed(page(drawn, "a <study>"))
    assert found.plots == len(drawn.plots)
    assert found.headings == len(drawn.plots) + 1, "and one for what is left out"
    assert found.foreign == []
    assert "a &lt;study&gt;" in page(drawn, "a <study>")


def test_nothing_stays_behind_in_matplotlib() -> None:
    before, style = pyplot.get_fignums(), dict(matplotlib.rcParams)
    draw(study_of(4), ["average/accuracy"])
    assert pyplot.get_fignums() == before
    assert {key: value for key, value in matplotlib.rcParams.items() if style[key] != value} == {}
