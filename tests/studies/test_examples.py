"""Every example of studies/examples: composed, with its space, and run with few trials on a tiny pool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import pytest

from harness.compose import compose
from harness.config import ROOT
from studies.coefficients import Depth
from studies.examples.adamerging import compare, markdown
from studies.objectives import bounds_of, objectives_of
from studies.samplers import unfit
from studies.settings import compose_study
from studies.space import space_of

if TYPE_CHECKING:
    from tests.studies.conftest import StudyPlace

EXAMPLES = sorted((ROOT / "studies" / "examples").glob("*.yaml"))
THREE_BLOCKS = Depth(before=True, blocks=3, after=True)  # of mini_clip8's vision tower


def test_there_are_examples() -> None:
    assert {"adamerging", "dare", "experts", "layers", "methods", "ties", "wilcoxon", "worst_task"} == {
        path.stem for path in EXAMPLES
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_composes_and_its_parts_fit_together(path: Path) -> None:
    composed = compose_study([f"study={path}"], compose)
    config = next(iter(composed.configs.values()))
    assert (config.pool_name, config.tasks_name) == ("mini_clip8", "mini_clip8")
    space = space_of(composed.settings, composed.configs, THREE_BLOCKS)
    faults: list[str] = []
    objectives = objectives_of(composed.settings.objectives, config, faults)
    bounds_of(composed.settings.constraints, config, faults)
    assert faults + unfit(composed.settings, space, objectives) == []


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("dare", ["method.density", "method.scale"]),
        ("ties", ["method.density", "method.scale", "method.disjoint"]),
        ("experts", 8),
        ("layers", 5),
        ("adamerging", 40),
        ("worst_task", 8),
        ("methods", ["task_arithmetic.scale", "ties.density", "ties.scale", "dare.density", "dare.scale"]),
    ],
)
def test_an_example_searches_what_its_first_line_says(name: str, axes: list[str] | int) -> None:
    composed = compose_study([f"study={ROOT}/studies/examples/{name}.yaml"], compose)
    found = [axis.name for axis in space_of(composed.settings, composed.configs, THREE_BLOCKS).axes]
    assert (len(found) if isinstance(axes, int) else set(found)) == (axes if isinstance(axes, int) else set(axes))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_what_it_is_and_how_to_run_it(path: Path) -> None:
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# ")
    assert f"crucible study study=studies/examples/{path.name}" in second
    assert f"{path.name}" in (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_to_its_report(place: StudyPlace, path: Path) -> None:
    finished = place.study(f"study={path}", "study.trials=3", "study.repeats=1", "study.plots=true")
    assert sum(row.state in ("COMPLETE", "PRUNED") for row in finished.rows) == 3
    assert finished.winners
    client = mlflow.MlflowClient(place.environment["MLFLOW_TRACKING_URI"])
    names = {file.path for file in client.list_artifacts(finished.parent)}
    assert names >= {"trials.json", "best_params.json", "plots"}
    plots = {file.path for file in client.list_artifacts(finished.parent, "plots")}
    assert "plots/study.html" in plots
    assert any(name.startswith("plots/history") for name in plots)
    assert "Repeat" in client.get_run(finished.parent).data.tags["mlflow.note.content"]


@pytest.mark.slow
def test_adamerging_and_optuna_stand_in_one_table(place: StudyPlace) -> None:
    learned = ["method.steps=3", "adaptation.split=validation", "adaptation.examples=6"]
    rows = compare([*place.choices, "study.trials=2"], place.choices[:3], learned)
    assert [(row["chosen by"].partition(",")[0], row["coefficients"]) for row in rows] == [
        ("default", "one"),
        ("AdaMerging", "expert"),
        ("Optuna", "expert"),
        ("AdaMerging", "expert_layer"),
        ("Optuna", "expert_layer"),
    ]
    assert len({row["run"] for row in rows}) == 5
    assert all(0 <= row["average on test"] <= 1 for row in rows)
    assert markdown(rows).count("\n") == 6
