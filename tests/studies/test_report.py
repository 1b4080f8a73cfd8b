from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import mlflow
import optuna
import pytest

from harness.compose import compose, to_yaml
from harness.compose_section import section
from harness.record import LONGEST_TAG, Run
from harness.track import open_run
from studies.finished import OWNER, RESULT, Finished, Winner, rows
from studies.objectives import Objective
from studies.report import MOST_PARAMS, best_params, description, report, shares
from studies.settings import StudySettings
from studies.space import space_of

SECONDS = {"merge": 0.2, "evaluate": 0.7, "optuna": 0.02, "mlflow": 0.03, "total": 1.0}


def finished_study(tracked: Run, n: int = 10, metrics: tuple[str, ...] = ("average/accuracy",), **settings) -> Finished:
    """A study as the core hands it over; trial 3 failed, trial 4 was pruned."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    told = replace(section(StudySettings, "study", spelled={"from": "from_study"}), **settings)
    config = compose(["method=ties", "pool=mini_clip8", "tasks=mini_clip8"])
    study = optuna.create_study(
        study_name="bowl", directions=["maximize"] * len(metrics), sampler=optuna.samplers.RandomSampler(0)
    )

    def objective(trial: optuna.Trial) -> list[float]:
        density, scale = trial.suggest_float("method.density", 0.05, 1), trial.suggest_float("method.scale", 0.1, 2)
        trial.set_user_attr(OWNER, {"name": f"trial {trial.number}"})
        values = [0.6 - (scale - 0.8) ** 2 / 10, 0.4 - (density - 0.5) ** 2 / 10][: len(metrics)]
        result = {
            "run_id": f"run{trial.number}",
            "metrics": {"digits/accuracy": 0.5, **dict(zip(metrics, values, strict=True))},
            "seconds": SECONDS,
        }
        if trial.number == 3:
            trial.set_user_attr(RESULT, {"reason": "the objective is not a number", "seconds": SECONDS})
            raise ValueError("not a number")
        if trial.number == 4 and len(metrics) == 1:
            trial.report(0.1, 0)
            trial.set_user_attr(RESULT, {**result, "steps": 1})
            raise optuna.TrialPruned
        trial.set_user_attr(RESULT, result)
        return values

    study.optimize(objective, n_trials=n, catch=(ValueError,))
    found = rows(study)
    best = {trial.number for trial in study.best_trials} if n else set()
    winners = [
        Winner(
            trial=row,
            config=config,
            yaml=to_yaml(config),
            command="crucible run method=ties method.scale=0.8",
            run_id=f"test{row.number}",
            metrics=dict.fromkeys(metrics, 0.55),
            model_uri="models:/m-1",
            seeds={1: {metrics[0]: 0.54}, 2: {metrics[0]: 0.56}},
            interval={metrics[0]: (0.53, 0.57)},
        )
        for row in found
        if row.number in best
    ]
    objectives = tuple(Objective(metric, "maximize") for metric in metrics)
    space = space_of(told, {"ties": config}, None)
    return Finished(study, told, space, objectives, config, "parent1", tracked, found, winners, 30.0, 2, SECONDS)


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> tuple[mlflow.MlflowClient, mlflow.entities.Run, Path]:
    """The run that a report was written to, and its artifacts."""
    directory = tmp_path_factory.mktemp("store")
    before, there = os.environ.get("MLFLOW_TRACKING_URI"), Path.cwd()
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{directory}/mlflow.db"
    os.chdir(directory)
    try:
        with open_run("studies", "bowl", {"kind": "study"}, {}) as run:
            report(finished_study(run, n=30))
        client = mlflow.MlflowClient(f"sqlite:///{directory}/mlflow.db")
        artifacts = Path(client.download_artifacts(str(run.id), ""))
        return client, client.get_run(str(run.id)), artifacts
    finally:
        os.chdir(there)
        os.environ.pop("MLFLOW_TRACKING_URI")
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def table(file: Path) -> list[dict]:
    held = json.loads(file.read_text())
    return [dict(zip(held["columns"], row, strict=True)) for row in held["data"]]


def test_the_run_holds_plots_tables_and_a_description(reported):
    _, run, artifacts = reported
    names = {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*") if path.is_file()}
    plots = (
        "history",
        "importances",
        "slice",
        "contour",
        "rank",
        "parallel_coordinate",
        "timeline",
        "intermediate_values",
    )
    assert names >= {"trials.json", "best_params.json", "plots/study.html", *(f"plots/{name}.png" for name in plots)}
    assert run.data.tags["mlflow.note.content"].startswith("**ties** on **mini_clip8**, scored on mini_clip8: **")
    assert run.info.status == "FINISHED"


def test_every_trial_is_a_row_with_what_it_tried_and_what_came_of_it(reported):
    found = table(reported[2] / "trials.json")
    assert [row["trial"] for row in found] == list(range(30))
    assert [row["state"] for row in found[2:5]] == ["complete", "failed", "pruned"]
    assert found[3]["reason"] == "the objective is not a number"
    assert found[3]["average/accuracy"] is None
    assert 0.05 <= found[0]["method.density"] <= 1
    assert found[0]["validation digits/accuracy"] == 0.5
    assert found[0]["merge_s"] == 0.2
    assert found[0]["run"] == "run0"


def test_best_parameters_come_with_their_importance(reported):
    found = table(reported[2] / "best_params.json")
    assert [row["parameter"] for row in found] == ["method.scale", "method.density"], "the scale is what matters"
    assert found[0]["importance"] > found[1]["importance"] >= 0
    assert len({row["trial"] for row in found}) == 1


def test_the_description_says_what_won_and_how_to_repeat_it():
    finished = finished_study(Run())
    told = description(finished, {"method.scale": 0.9}, {"contour": "too few"})
    best = finished.study.best_trial
    assert f"**{100 * best.value:.1f} %** average/accuracy on validation by trial {best.number}" in told
    assert "10 trials (8 complete, 1 failed, 1 pruned)" in told
    assert "Scored once on test: **55.0 %** average/accuracy (95 % of resamplings lie from 53.0 % to 57.0 %)" in told
    assert "2 further seeds: 55.0 %, standard deviation 1.41 points" in told
    assert f"| method.scale | {best.params['method.scale']:.4g} | 90.0 % |" in told
    assert "```bash\ncrucible run method=ties method.scale=0.8\n```" in told
    assert "30 s with 2 workers, 1 s a trial. A trial's time: merge 20.0 %, evaluate 70.0 %" in told
    assert "Sampler tpe." in told
    assert '`tags."mlflow.parentRunId" = "parent1"`' in told
    assert "Plots left out: contour (too few)." in told


def test_bounds_pruner_and_repeats_are_said():
    finished = finished_study(Run(), constraints={"worst/accuracy": {"at_least": 0.4}}, pruner="wilcoxon", repeats=3)
    told = description(finished, {}, {})
    assert "Sampler tpe, pruned by wilcoxon, held to worst/accuracy at least 0.4, 3 seeds each." in told


def test_a_front_is_a_table_of_its_trials():
    finished = finished_study(Run(), metrics=("average/accuracy", "worst/accuracy"))
    told = description(finished, {}, {})
    assert len(finished.winners) > 1
    assert f"{len(finished.winners)} trials are best, each in its own way" in told
    for winner in finished.winners:
        assert f"| {winner.trial.number} | {100 * winner.trial.values[0]:.1f} % |" in told
    assert "| average/accuracy on test |" in told
    assert {row["trial"] for row in best_params(finished, {})} == {winner.trial.number for winner in finished.winners}


def test_a_study_without_a_complete_trial_is_reported_too():
    finished = finished_study(Run(), n=0)
    report(finished)
    assert "0 trials" in description(finished, {}, {})
    assert "none that can win" in description(finished, {}, {})


def test_many_parameters_and_a_long_command_leave_room_for_the_rest():
    finished = finished_study(Run())
    winner = finished.winners[0]
    many = {f"method.weights/digits/layer {index}": 0.123456789 for index in range(200)}
    long = replace(winner, trial=replace(winner.trial, params=many), command="crucible run " + "x" * 20_000)
    told = description(replace(finished, winners=[long]), {}, {})
    assert len(told) < LONGEST_TAG
    assert f"{200 - MOST_PARAMS} more parameters in `best_params.json`" in told
    assert f"crucible run --from-run {winner.run_id}" in told


def test_shares_of_time_add_up_to_one():
    assert shares(SECONDS) == pytest.approx(
        {"merge": 0.2, "evaluate": 0.7, "optuna": 0.02, "mlflow": 0.03, "other": 0.05}
    )
    assert shares({}) == {}
