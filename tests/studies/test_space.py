"""What is searched: default ranges, what a study changes of them, coefficients, and everything that is refused."""

from __future__ import annotations

import pickle

import optuna
import pytest

from harness.compose import compose
from harness.config import ConfigError
from studies.coefficients import Depth
from studies.settings import compose_study
from studies.space import Space, space_of


def made(*overrides: str, depth: Depth | None = None) -> Space:
    composed = compose_study(["evaluation.split=validation", *overrides], compose)
    return space_of(composed.settings, composed.configs, depth)


def faults(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        made(*overrides)
    return str(caught.value)


def trial(**params: object) -> optuna.trial.FixedTrial:
    return optuna.trial.FixedTrial(params)


def test_the_ranges_beside_the_parameters_are_searched_by_default() -> None:
    assert made("method=ties").told() == {
        "method": "ties", "method.density": "[0.05, 1.0]", "method.scale": "[0.1, 2.0]",
    }  # fmt: skip


def test_a_parameter_that_does_nothing_is_not_searched() -> None:
    assert "method.trim" not in made("method=dare").told()
    assert "method.trim" in made("method=dare", "method.base_rule=ties").told()


def test_a_study_narrows_fixes_and_adds() -> None:
    space = made(
        "method=ties",
        "study.space.method.density.high=0.5",
        "study.space.method.scale=1.5",
        "study.space.method.disjoint.choices=[mean,sum]",
        "study.space.seed={low: 0, high: 9}",
    )
    assert space.told() == {
        "method": "ties",
        "method.density": "[0.05, 0.5]",
        "method.disjoint": "one of mean, sum",
        "seed": "[0, 9]",
        "method.scale": "fixed at 1.5",
    }
    config = space.config({"method.density": 0.25, "method.disjoint": "sum", "seed": 4})
    assert (config.method.density, config.method.disjoint, config.method.scale, config.seed) == (0.25, "sum", 1.5, 4)


def test_a_veneer_around_the_method_is_searched_with_it() -> None:
    space = made("method=ties", "veneers=[lines]", "study.space.veneer.lines.beta.high=1.0")
    assert space.told()["veneer.lines.alpha"] == "[0.0, 1.0]"
    assert space.told()["veneer.lines.beta"] == "[0.0, 1.0]"
    config = space.config({"veneer.lines.alpha": 0.25, "method.density": 0.4})
    assert (config.veneer.lines.alpha, config.veneers, config.method.density) == (0.25, ["lines"], 0.4)
    assert pickle.loads(pickle.dumps(config)) == config  # as it goes to a worker
    assert space.defaults()[0]["veneer.lines.alpha"] == 0.5
    idle = faults("method=ties", "study.space.veneer.lines.alpha={low: 0, high: 1}")
    assert "lines is not around the method; add it with veneers=[lines]" in idle
    choice = made("method=ties", "study.space.veneers={choices: [[], [lines]]}", "study.space.veneer.lines.alpha={}")
    assert choice.config({"veneers": '["lines"]'}).veneers == ["lines"]


def test_each_method_of_several_has_its_own_parameters() -> None:
    space = made("study.methods=[ties,dare]", "study.space.method.scale.high=1.0", "study.space.dare.density.low=0.5")
    told = space.told()
    assert told["ties.density"] == "[0.05, 1.0]"
    assert told["dare.density"] == "[0.5, 1.0]"
    assert told["ties.scale"] == "[0.1, 1.0]"
    assert told["dare.scale"] == "[0.0, 1.0]"
    params = {"method": "dare", "dare.density": 0.75, "dare.scale": 0.5}
    suggested = space.suggest(optuna.trial.FixedTrial(params))
    assert suggested == params
    config = space.config(params)
    assert (config.method_name, config.method.density) == ("dare", 0.75)


def test_coefficients_of_experts_are_weights_and_the_scale_is_one() -> None:
    space = made("study.coefficients=expert", "study.coefficient_range.high=0.6", "experts=[digits,letters]")
    assert [axis.name for axis in space.axes] == ["method.weights/digits", "method.weights/letters"]
    config = space.config({"method.weights/digits": 0.5, "method.weights/letters": 0.25})
    assert (config.method.weights, config.method.scale) == ([0.5, 0.25], 1.0)


def test_coefficients_of_layers_are_schedules() -> None:
    depth = Depth(before=True, blocks=2, after=True)
    space = made("study.coefficients=layer", depth=depth)
    assert [axis.name for axis in space.axes] == [f"method.scale/layer {layer}" for layer in range(4)]
    config = space.config({f"method.scale/layer {layer}": layer / 4 for layer in range(4)})
    assert config.schedules["scale"] == [
        {"at": "before", "value": 0.0}, {"at": "blocks", "value": [0.25, 0.5]}, {"at": "after", "value": 0.75},
    ]  # fmt: skip


def test_a_curve_has_a_number_for_each_knot_and_expert() -> None:
    space = made("study.coefficients=expert_layer", "study.knots=3", "experts=[digits,letters]")
    assert len(space.axes) == 6
    config = space.config({axis.name: index / 10 for index, axis in enumerate(space.axes)})
    assert config.schedules["weights"] == [[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]]


def test_the_default_of_every_method_is_a_start() -> None:
    space = made("study.methods=[ties,dare]")
    assert space.defaults() == [
        {"method": "ties", "ties.density": 0.2, "ties.scale": 1.0},
        {"method": "dare", "dare.density": 0.5, "dare.scale": 0.3},
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["study.space.method.densty.low=0.1"], "there is no such key; did you mean method.density?"),
        (["study.space.method.density={low: 0.9, high: 0.2}"], "low 0.9 is above high 0.2"),
        (["study.space.method.density={low: 0.0, high: 1}"], "density is a share in (0, 1]"),
        (["study.space.method.disjoint=median"], "disjoint is one of mean, sum, max"),
        (["study.space.method.disjoint.choices=[mean,median]"], "disjoint is one of mean, sum, max"),
        (["study.space.method.disjoint={low: 0, high: 1}"], "disjoint"),
        (["study.space.engine.workers={}"], "it has no range by default"),
        (["study.space.evaluation.split.choices=[test]"], "a study cannot search this"),
        (["study.space.method.scale={low: 0.1, high: 1, log: true, step: 0.1}"], "log and step exclude each other"),
        (["study.space.method.scale={low: 0.1, hihg: 1}"], "did you mean high?"),
        (["study.space.seed={low: 0, high: 0.5}"], "whole numbers are wanted"),
        (["study.coefficients=layers"], "coefficients is one of"),
        (["study.knots=3"], "knots are of a curve over the depth"),
        (["study.trials=0"], "trials must be at least 1"),
        (["study.trails=5"], "did you mean study.trials?"),
        (["study=nothing"], "no study is called 'nothing'"),
        (["study.methods=[ties,darre]"], "did you mean dare?"),
    ],
)
def test_what_is_refused_says_what_to_do(overrides: list[str], said: str) -> None:
    assert said in faults("method=ties", *overrides)


def test_a_method_without_what_is_searched_is_named() -> None:
    assert "simple_average has no scale" in faults("method=simple_average", "study.coefficients=global")
    assert "nothing is searched" in faults("method=simple_average")


def test_all_faults_are_told_at_once() -> None:
    text = faults("method=ties", "study.space.method.density.low=2", "study.space.method.scale.high=-1")
    assert "density" in text
    assert "scale" in text
