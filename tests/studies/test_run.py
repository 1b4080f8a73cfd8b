"""Whole studies on tiny models: what is searched is found again in Optuna and in MLflow, and nothing is lost."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import mlflow
import optuna
import pytest

from harness.config import UserError
from studies.finished import rows
from studies.run import plan
from studies.storage import open_storage

PATIENCE_S = 600  # for what is over in seconds where nothing else runs
COUNTED = ("COMPLETE", "PRUNED", "FAIL")


def agreed(place, study: optuna.Study) -> None:
    """Every trial that has ended has one child run, with its state and parameters."""
    runs = {int(run.data.tags["crucible.trial"]): run for run in place.trial_runs(study.study_name)}
    assert len(runs) == len(place.trial_runs(study.study_name)), "a trial has two runs"
    ended = [row for row in rows(study) if row.state in COUNTED]
    assert set(runs) == {row.number for row in ended}
    for row in ended:
        run = runs[row.number]
        assert run.info.status in (("FINISHED",) if row.state != "FAIL" else ("FAILED", "KILLED"))
        assert run.data.tags["crucible.state"] == row.state
        assert set(run.data.params) == set(row.params)


def test_a_study_finds_what_a_run_repeats(place) -> None:
    finished = place.study("method=ties", "trials=4", "study.name=s")
    assert [row.state for row in finished.rows] == ["COMPLETE"] * 4
    assert finished.rows[0].params == {"method.density": 0.2, "method.scale": 1.0}
    agreed(place, finished.study)
    (winner,) = finished.winners
    assert winner.trial.values == (max(row.values[0] for row in finished.rows),)
    parent, own = mlflow.get_run(finished.parent), mlflow.get_run(winner.run_id)
    assert own.data.tags["mlflow.parentRunId"] == finished.parent
    assert own.data.params["evaluation.split"] == "test"
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best/average/accuracy"] == winner.trial.values[0]
    assert parent.data.metrics["test/average/accuracy"] == winner.metrics["average/accuracy"]
    assert parent.data.metrics["test/average/accuracy_low"] <= winner.metrics["average/accuracy"]


def test_the_winner_is_repeated_and_registered(place) -> None:
    import shlex

    from harness.compose import compose, from_yaml
    from harness.run import run

    finished = place.study(
        "study.methods=[ties,dare]", "study.coefficients=expert_layer", "trials=3", "study.name=s",
        "tracking.log_model=true", "study.register=red-green", "study.space.dare.rescale.choices=[share,none]",
    )  # fmt: skip
    (winner,) = finished.winners
    config = from_yaml(winner.yaml)
    _, command, *overrides = shlex.split(winner.command)
    assert (command, compose(overrides)) == ("run", config)
    again = run(config)
    assert again.metrics == {name: winner.metrics[name] for name in again.metrics}
    version = mlflow.MlflowClient().get_model_version_by_alias("red-green", "best")
    assert version.run_id == winner.run_id
    assert mlflow.artifacts.load_text(f"runs:/{finished.parent}/best_config.yaml") == winner.yaml


@pytest.mark.slow
def test_a_search_on_the_embedded_suite_beats_the_default(place) -> None:
    finished = place.study("pool=mini_clip8", "tasks=mini_clip8", "method=ties", "trials=6", "study.name=s")
    default, best = finished.rows[0].values[0], finished.winners[0].trial.values[0]
    assert best > default
    assert finished.winners[0].metrics["average/accuracy"] == pytest.approx(best, abs=0.05)


def test_a_trial_scores_what_a_run_scores(place) -> None:
    from harness.run import run

    finished = place.study("method=dare", "trials=2", "study.name=s")
    for row in finished.rows:
        config = finished.space.config(row.params)
        outcome = run(dataclasses.replace(config, engine=dataclasses.replace(config.engine, dtype=None)))
        assert row.metrics["average/accuracy"] == outcome.metrics["average/accuracy"]
        assert row.metrics["average/loss"] == pytest.approx(outcome.metrics["average/loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare", "task_arithmetic", "weighted_average", "fisher", "opcm"])
def test_what_is_kept_between_trials_changes_no_bit(place, method: str) -> None:
    from harness.trials import Resident
    from harness.vary import vary

    first = place.composed(f"method={method}", "evaluation.split=validation").configs[method]
    values = {"density": 0.6, "scale": 0.7} if method in ("ties", "dare") else {}
    second = vary(first, {f"method.{name}": value for name, value in values.items()})
    resident, metrics = Resident(first), []
    for config in (first, second, first):
        fresh = Resident(config)
        kept, new = list(resident.score(config, 3))[-1], list(fresh.score(config, 3))[-1]
        names = [name for name in kept.metrics if not name.startswith("time/")]
        assert [kept.metrics[name] for name in names] == [new.metrics[name] for name in names]
        metrics.append(new.metrics["average/loss"])
    assert metrics[0] == metrics[2]


@pytest.mark.slow
def test_what_a_veneer_changes_is_not_taken_from_before(place) -> None:
    from harness.trials import Resident
    from harness.vary import vary

    first = place.composed("method=ties", "veneers=[larv]", "evaluation.split=validation").configs["ties"]
    second = vary(first, {"veneer.larv.low": 0.0})
    resident = Resident(first)
    kept = [list(resident.score(config, 0))[-1].metrics["average/loss"] for config in (first, second)]
    new = [list(Resident(config).score(config, 0))[-1].metrics["average/loss"] for config in (first, second)]
    assert kept == new
    assert kept[0] != kept[1]


def test_pieces_come_to_what_the_whole_comes_to(place) -> None:
    from harness.trials import Resident

    config = place.composed("method=ties", "evaluation.split=validation").configs["ties"]
    whole, pieces = list(Resident(config).score(config, 0)), list(Resident(config, step_rows=5).score(config, 0))
    assert (len(whole), len(pieces)) == (3, 9)
    assert sorted(step.index for step in pieces) == list(range(9))
    for name, value in whole[-1].metrics.items():
        if not name.startswith("time/"):
            assert pieces[-1].metrics[name] == pytest.approx(value, rel=1e-6)


def test_several_objectives_have_a_front(place) -> None:
    finished = place.study(
        "study.objectives=[average/loss,worst/accuracy]", "study.sampler=nsgaii", "trials=5", "study.name=s",
        "study.sampler_settings.population_size=4",
    )  # fmt: skip
    assert len(finished.winners) == len(finished.study.best_trials)
    assert [objective.direction for objective in finished.objectives] == ["minimize", "maximize"]
    agreed(place, finished.study)


@pytest.mark.parametrize(
    ("sampler", "more"),
    [
        ("cmaes", ["study.coefficients=expert"]),
        pytest.param("gp", ["study.sampler_settings.n_startup_trials=2"], marks=pytest.mark.slow),
        pytest.param("nsgaiii", [], marks=pytest.mark.slow),
        pytest.param("qmc", [], marks=pytest.mark.slow),
        pytest.param("random", [], marks=pytest.mark.slow),
        ("grid", ["study.sampler_settings.points=2"]),
        ("bruteforce", ["study.space.method.scale={low: 0.1, high: 0.4, step: 0.1}"]),
    ],
)
def test_every_sampler_searches(place, sampler: str, more: list[str]) -> None:
    finished = place.study(f"study.sampler={sampler}", "trials=4", "study.name=s", *more)
    tried = [tuple(row.params.values()) for row in finished.rows]
    assert len(set(tried)) == len(tried) == (2 if sampler == "grid" else 4)


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["median", "percentile", "hyperband", "successive_halving", "patient", "wilcoxon"])
def test_every_pruner_looks_on(place, pruner: str) -> None:
    more = ["study.objectives=[average/loss]", "study.step_rows=2", "study.space.method.scale={low: 0.1, high: 9}"]
    finished = place.study(f"study.pruner={pruner}", "trials=8", "study.name=s", "study.sampler=random", *more)
    assert {row.state for row in finished.rows} <= {"COMPLETE", "PRUNED"}
    for trial in finished.study.trials:
        assert trial.intermediate_values
    agreed(place, finished.study)


def test_wilcoxon_stops_what_is_worse(place) -> None:
    finished = place.study(
        "study.pruner=wilcoxon", "study.objectives=[average/loss]", "study.step_rows=2", "trials=6", "study.name=s",
        "study.space.method.scale={low: 0.1, high: 50}", "study.sampler=random", "study.starts=[{method.scale: 0.1}]",
    )  # fmt: skip
    pruned = [row for row in finished.rows if row.state == "PRUNED"]
    assert pruned
    assert [len(trial.intermediate_values) for trial in finished.study.trials] == [row.steps for row in finished.rows]
    assert all(row.steps < 18 for row in pruned)
    assert all(row.values == (row.metrics["average/loss"],) for row in pruned)
    assert all(row.values > finished.winners[0].trial.values for row in pruned)


def test_seeds_are_averaged_and_their_spread_told(place) -> None:
    finished = place.study(
        "method=dare", "trials=2", "study.repeats=3", "study.name=s", "study.objectives=[average/loss]"
    )
    assert all(row.metrics["spread/average/loss"] > 0 for row in finished.rows)
    assert list(finished.winners[0].seeds) == [3]


def test_a_broken_trial_fails_with_its_reason_and_the_study_goes_on(place) -> None:
    finished = place.study(
        "trials=3", "study.name=s", "study.starts=[{method.scale: 1.0e+40}]",
        "study.space.method.scale={low: 0.1, high: 1.0e+41}", "study.sampler=random",
    )  # fmt: skip
    assert finished.rows[0].state == "FAIL"
    assert "beyond the range" in str(finished.rows[0].reason)
    assert len(finished.rows) == 3
    agreed(place, finished.study)


def test_constraints_decide_who_may_win(place) -> None:
    finished = place.study("trials=4", "study.name=s", "study.constraints={average/loss: {at_most: 100}}")
    assert all(row.feasible for row in finished.rows)
    with pytest.raises(UserError, match=r"no trial keeps to study\.constraints"):
        place.study("trials=2", "study.name=t", "study.constraints={average/loss: {at_most: 0.001}}")
    (parent,) = mlflow.search_runs(filter_string="tags.study = 't' and tags.kind = 'study'", output_format="list",
                                   search_all_experiments=True)  # fmt: skip
    assert "none that can win" in parent.data.tags["mlflow.note.content"]


def test_another_studys_best_is_tried_first(place) -> None:
    before = place.study("trials=3", "study.name=one").winners[0].trial
    after = place.study("trials=2", "study.name=two", "study.from=one")
    assert after.rows[0].params == before.params
    with pytest.raises(UserError, match="did you mean one"):
        place.study("trials=2", "study.name=three", "study.from=onee")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["study.objectives=[average/accurracy]"], "did you mean average/accuracy"),
        (["study.objectives=[{metric: average/accuracy, direction: up}]"], "direction up"),
        (["study.constraints={average/f1: {at_least: 1}}"], "no metric of these tasks"),
        (["study.split=test"], "study.search_on_test=true"),
        (["study.sampler=tpf"], "did you mean tpe"),
        (["study.sampler_settings.sigma=1"], "no such setting"),
        (["study.pruner=hyperbnd"], "did you mean hyperband"),
        (["study.pruner=median", "study.objectives=[average/loss,worst/accuracy]"], "only a single objective"),
        (["study.pruner=wilcoxon", "study.objectives=[worst/accuracy]"], "compares means"),
        (["study.sampler=bruteforce"], "give it a step or choices"),
        (["study.repeats=2", "study.space.seed={low: 0, high: 3}"], "not both"),
        (["tasks=none"], "there are no tasks"),
        (["study.storage=sqlite:////nowhere/at/all.db"], "there is no directory"),
        (["study.storage=postgresql://127.0.0.1:9/none"], "cannot be used"),
        (["study.storage=mongo://x"], "it is one of"),
        (["study.resume=true"], "study.name=NAME"),
        (["study.resume=true", "study.name=unknown"], "has no such study"),
    ],
)
def test_what_is_refused_before_the_first_trial(place, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        place.study("method=task_arithmetic", "trials=2", *overrides)
    assert said in str(caught.value)
    assert not place_has_runs(place)


def place_has_runs(place) -> bool:
    client = mlflow.MlflowClient(place.environment["MLFLOW_TRACKING_URI"])
    return bool(client.search_runs([found.experiment_id for found in client.search_experiments()]))


def test_the_test_split_is_searched_when_that_is_said(place) -> None:
    planned = plan(place.composed("study.split=test", "study.search_on_test=true"))
    assert planned.config.evaluation.split == "test"


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_study_goes_on_by_its_name(place) -> None:
    first = place.study("trials=2", "study.name=s")
    again = place.study("trials=4", "study.name=s", "study.resume=true")
    assert again.parent == first.parent
    assert len(again.rows) == 4
    agreed(place, again.study)
    with pytest.raises(UserError, match=r"study\.resume=true goes on"):
        place.study("trials=2", "study.name=s")


def test_a_study_that_changed_is_not_resumed_and_told_how(place) -> None:
    place.study("trials=2", "study.name=s")
    for change, said in (
        ("study.space.method.scale.high=0.5", r"space method.scale: it was \[0.0, 1.5\], it is \[0.0, 0.5\] now"),
        ("study.objectives=[average/loss]", "objective average/loss: it is new"),
        ("evaluation.limit=4", "evaluation.limit: it was None, it is 4 now"),
    ):
        with pytest.raises(UserError, match=said):
            place.study("trials=3", "study.name=s", "study.resume=true", change)


def test_a_killed_study_loses_nothing(place) -> None:
    killed_at_random_moments(place, 2, [], 8, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "seed"), [(1, 0), (2, 1), (2, 2)])
def test_killing_at_random_moments_again_and_again_loses_nothing(place, workers: int, seed: int) -> None:
    killed_at_random_moments(place, 3, [f"workers={workers}"], 60, seed)


def killed_at_random_moments(place, kills: int, more: list[str], trials: int, seed: int) -> None:
    """Kill a study's processes some time after its first trial, resume it, again; in the end all agrees."""
    chance = random.Random(seed)
    asked = ["study.name=s", f"trials={trials}", "method=ties", *more]
    for attempt in range(kills):
        process = place.start(*asked, *(["study.resume=true"] if attempt else []))
        before = ended(place)
        wait_for(lambda process=process, before=before: process.poll() is not None or ended(place) > before)
        time.sleep(chance.random() * 0.4)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), output
    finished = place.study(*asked, "study.resume=true")
    states = Counter(row.state for row in finished.rows)
    retried = {row.retry_of for row in finished.rows}
    counted = [row for row in finished.rows if row.state in COUNTED and row.number not in retried]
    assert len(counted) == trials
    assert not states["RUNNING"]
    assert not states["WAITING"]
    agreed(place, finished.study)


def ended(place) -> int:
    """Trials that have ended, as a reader of the file sees them, who leaves nothing in it."""
    query = "SELECT COUNT(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED', 'FAIL')"
    try:
        with closing(sqlite3.connect(f"file:{place.directory / 'studies.db'}?mode=ro", uri=True)) as reader:
            return int(reader.execute(query).fetchone()[0])
    except sqlite3.OperationalError:  # there is no file, no table, or somebody is making it
        return 0


def wait_for(true) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["journal", "postgresql", "grpc"])
def test_other_storages_serve_two_workers(place, storage: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{storage}_url")
    finished = place.study("trials=6", "study.name=s", "workers=2", f"study.storage={url}")
    assert [row.state for row in finished.rows] == ["COMPLETE"] * 6
    agreed(place, finished.study)
    again = place.study("trials=7", "study.name=s", f"study.storage={url}", "study.resume=true")
    assert len(again.rows) == 7
    agreed(place, again.study)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_queued_trial_is_begun_by_one_worker(tmp_path) -> None:
    """Optuna's own storage reads the state before it writes it; of forty trials its workers began most twice."""
    storage = open_storage(f"sqlite:///{tmp_path}/studies.db", 15)
    study = optuna.create_study(storage=storage)
    for index in range(20):
        study.enqueue_trial({"x": index})
    begun: list[int] = []

    def work() -> None:
        own = optuna.load_study(study_name=study.study_name, storage=storage)
        begun.extend(own.ask().number for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(begun) == list(range(20))


def test_a_study_that_was_killed_while_it_was_made_is_made_anew(place) -> None:
    optuna.create_study(study_name="s", storage=open_storage(place.storage, 15), direction="maximize")
    finished = place.study("trials=1", "study.name=s", "study.resume=true", "study.bootstrap=0")
    assert finished.rows[0].params == {"method.scale": 0.3}


@pytest.fixture
def journal_url(place) -> str:
    return f"journal:{place.directory / 'study.log'}"


@pytest.fixture
def postgresql_url(tmp_path) -> Iterator[str]:
    """A server of this test alone, on the loopback; it refuses to run as root, so another user runs it then."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries:
        pytest.skip("PostgreSQL's server is not installed: apt install postgresql")
    data, port = Path(tempfile.mkdtemp(prefix="crucible-pg-")), free_port()
    runuser = shutil.which("runuser", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    user = [runuser, "-u", "postgres", "--"] if runuser and os.getuid() == 0 else []
    if user:
        shutil.chown(data, "postgres")
    run = partial(subprocess.run, check=True, capture_output=True, cwd="/")
    run([*user, binaries[-1] / "initdb", "-D", data / "db", "-U", "crucible", "-A", "trust"])
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data} -c fsync=off"
    run([*user, binaries[-1] / "pg_ctl", "-D", data / "db", "-w", "-l", data / "log", "-o", options, "start"])
    try:
        yield f"postgresql://crucible@127.0.0.1:{port}/postgres"
    finally:
        run([*user, binaries[-1] / "pg_ctl", "-D", data / "db", "-m", "immediate", "stop"])
        shutil.rmtree(data, ignore_errors=True)


@pytest.fixture
def grpc_url(place) -> Iterator[str]:
    pytest.importorskip("grpc")
    port = free_port()
    serve = (
        "import optuna; optuna.storages.run_grpc_proxy_server("
        f"optuna.storages.RDBStorage('sqlite:///{place.directory}/proxied.db'), host='127.0.0.1', port={port})"
    )
    process = subprocess.Popen([sys.executable, "-c", serve], stderr=subprocess.DEVNULL)
    yield f"grpc://127.0.0.1:{port}"
    process.kill()
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_trial_only(place) -> None:
    import psutil

    process = place.start("study.name=s", "trials=12", "workers=2", "study.step_rows=1")
    wait_for(lambda: ended(place) > 2 or process.poll() is not None)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    study = optuna.load_study(study_name="s", storage=place.storage)
    found = rows(study)
    retried = {row.retry_of for row in found}
    assert len([row for row in found if row.state in COUNTED and row.number not in retried]) == 12
    dead = [row for row in found if row.state == "FAIL"]
    assert len(dead) <= 1
    assert all("killed by SIGKILL" in str(row.reason) for row in dead)
    agreed(place, study)


@pytest.mark.slow
def test_ctrl_c_ends_a_study_that_goes_on(place) -> None:
    process = place.start("study.name=s", "trials=100", "workers=2")
    wait_for(lambda: ended(place) > 1 or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, output
    assert "study.resume=true" in output
    finished = place.study("study.name=s", f"trials={ended(place) + 2}", "study.resume=true")
    agreed(place, finished.study)
