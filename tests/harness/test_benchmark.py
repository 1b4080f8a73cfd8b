"""The benchmark of all methods: what it is told, what its table says, and that what is finished is not repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.benchmark import Asked, _plan, asked_of, every_method
from harness.benchmark_table import Entry, in_words, is_finished, markdown, table_of
from harness.compose import compose
from harness.config import ConfigError
from harness.nested import Child
from harness.plots import ranking
from methods.catalogue import CATALOGUE


def study(method: str, mean: float, metric: str = "average/accuracy", **tags: str) -> Child:
    """A study's run as the store has it when it is finished."""
    what = metric.rpartition("/")[2]
    metrics = {f"best/{metric}": mean + 0.01, f"test/{metric}": mean, f"test/red/{what}": mean - 0.1}
    if what == "accuracy":
        metrics |= {f"test/{metric}_low": mean - 0.02, f"test/{metric}_high": mean + 0.03}
        metrics |= {"test/average/normalized": mean + 0.2}
    return Child("id", "FINISHED", {"method": method, "best_run": "x", **tags}, {}, metrics)


def table(*entries: Entry, failed: dict[str, str] | None = None) -> dict[str, Any]:
    facts = {"command": "crucible benchmark", "trials": 3, "seed": 0, "pool": "p", "tasks": "t", "searched_on": "v"}
    return facts | table_of(entries, "test", ["red"], failed or {})


def test_the_benchmarks_own_keys_are_told_from_the_studies() -> None:
    asked = asked_of(["methods=[ties, dare,ties]", "trials=4", "study.workers=2", "output=a/b.md", "seed=3"])
    assert asked == Asked(("ties", "dare"), 4, "benchmark", Path("a/b.md"), ("study.workers=2", "seed=3"))
    assert asked.command == "crucible benchmark 'methods=[ties,dare]' trials=4 output=a/b.md study.workers=2 seed=3"
    assert asked.fixed == "trials=4 seed=3"


def test_all_is_every_method_but_a_single_expert() -> None:
    asked = asked_of([])
    assert set(asked.methods) == set(CATALOGUE) - {"expert"}
    assert asked.trials == 30
    assert asked.command == "crucible benchmark methods=all trials=30"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["methods=[tise]"], "did you mean ties?"),
        (["methods=[]"], "give all, or a list"),
        (["trials=0"], "trials=0: a whole number from 1 on"),
        (["trials=many"], "trials=many"),
        (["method=ties"], "method=ties: the benchmark sets this itself"),
        (["study.trials=3"], "study.trials=3: the benchmark sets this itself"),
        (["study.name=x"], "its own keys are methods, trials, name, output"),
        (["study.resume=true"], "study.resume=true"),
    ],
)
def test_bad_input_is_refused(given: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        asked_of(given)
    assert says in str(refused.value)


def test_every_method_is_planned_from_its_facts() -> None:
    planned = _plan(asked_of(["methods=[ties,simple_average,nuslerp,fisher]", "study.workers=2"]), compose)
    alone = "study.space={seed: {choices: [0]}}"
    assert alone in planned["simple_average"].overrides, "no ranges: one trial"
    assert alone not in planned["ties"].overrides
    assert planned["ties"].experts is None
    assert planned["nuslerp"].experts == ("digits", "photographs")
    assert "experts=[digits,photographs]" in planned["nuslerp"].overrides
    assert "adaptation.split=train" in planned["fisher"].overrides, "not the rows that settings are chosen by"
    assert all("study.workers=2" in one.overrides for one in planned.values())


def test_faults_of_all_methods_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        _plan(asked_of(["methods=[ties,slerp]", "method.scale=1", "method.t=0.5"]), compose)
    told = str(refused.value)
    assert "method.t" in told, "of ties, which has none"
    assert "method.scale" in told, "of slerp, which has none"
    with pytest.raises(ConfigError, match="workers"):
        _plan(asked_of(["workers=2"]), compose)


def test_the_best_method_stands_first_with_its_interval() -> None:
    found = table(
        Entry("ties", study("ties", 0.6, **{"best_param.method.density": "0.41234567"}), None),
        Entry("nuslerp", study("nuslerp", 0.7), ["red", "blue"]),
        failed={"dare": "no disk"},
    )
    assert [row["method"] for row in found["rows"]] == ["nuslerp", "ties", "dare"]
    text = markdown(found)
    assert "| `ties` | task vectors | 60.0 | 58.0 to 63.0 | 80.0 | 50.0 | density=0.4123 |" in text
    assert "| `nuslerp` of red and blue | geometry | 70.0 |" in text
    assert "| defaults |" in text
    assert "`dare` has no row: no disk" in text
    assert in_words(found["rows"][1], found["metric"]) == "60.0 (58.0 to 63.0) with density=0.4123"
    assert json.loads(json.dumps(found)) == found


def test_of_perplexity_less_is_better_and_has_no_interval() -> None:
    metric = "average/perplexity"
    found = table(*(Entry(name, study(name, mean, metric), None) for name, mean in (("ties", 9.5), ("dare", 7.25))))
    assert [row["method"] for row in found["rows"]] == ["dare", "ties"]
    assert "| `dare` | task vectors | 7.250 | - | - | 7.150 | defaults |" in markdown(found)
    assert in_words(found["rows"][0], metric) == "7.250 with defaults"


def test_a_benchmark_of_failures_alone_has_a_table_too() -> None:
    assert markdown(table(failed={"dare": "no disk"})).endswith("`dare` has no row: no disk\n")


def test_only_a_study_with_a_scored_winner_is_finished() -> None:
    assert is_finished(study("ties", 0.5))
    assert not is_finished(Child("id", "FINISHED", {"method": "ties"}))
    assert not is_finished(Child("id", "KILLED", {"method": "ties", "best_run": "x"}))


def test_the_plot_has_every_method_the_best_on_top() -> None:
    rows = table(*(Entry(name, study(name, mean), None) for name, mean in (("ties", 0.5), ("dare", 0.7))))["rows"]
    axes = ranking(rows, "average/accuracy").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dare", "ties"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert axes.get_xlabel() == "average accuracy in %, 95 % interval"


def test_all_methods_have_a_family_in_the_table() -> None:
    rows = table(*(Entry(name, study(name, 0.5), None) for name in every_method()))["rows"]
    assert len(rows) == len(every_method())
    assert all(row["family"] for row in rows)


@pytest.mark.slow
def test_a_benchmark_is_run_and_goes_on_where_it_was(build_workplace, tmp_path: Path) -> None:
    place = build_workplace(tmp_path / "place")
    quick = ("trials=2", "study.plots=false", "study.bootstrap=20", "study.final_seeds=1", "output=table.md")
    first = place.cli("benchmark", "methods=[simple_average,task_arithmetic]", *quick, timeout=600)
    assert first.returncode == 0, first.stderr
    written = json.loads((place.directory / "table.json").read_text())
    assert {row["method"] for row in written["rows"]} == {"simple_average", "task_arithmetic"}
    assert all(row["low"] <= row["mean"] <= row["high"] for row in written["rows"])
    assert (place.directory / "table.md").read_text() == markdown(written)
    before = place.runs()
    parent = next(run for run in before.values() if run.data.tags.get("kind") == "benchmark")
    studies = [run for run in before.values() if run.data.tags.get("kind") == "study"]
    assert {run.data.tags["mlflow.parentRunId"] for run in studies} == {parent.info.run_id}
    means = {row["method"]: row["mean"] for row in written["rows"]}
    assert {name: parent.data.metrics[f"{name}/average/accuracy"] for name in means} == means
    again = place.cli("benchmark", "methods=[simple_average,task_arithmetic,nuslerp]", *quick, timeout=600)
    assert again.returncode == 0, again.stderr
    after = place.runs()
    new = [run for key, run in after.items() if key not in before]
    assert {run.data.tags["method"] for run in new if run.data.tags.get("kind") == "study"} == {"nuslerp"}
    assert sum(run.data.tags.get("kind") == "benchmark" for run in after.values()) == 1
    other = place.cli("benchmark", "methods=[ties]", "trials=3", timeout=600)
    assert other.returncode == 2
    assert "its methods could not be compared" in other.stderr


@pytest.mark.slow
def test_a_method_that_fails_does_not_end_the_others(build_workplace, tmp_path: Path) -> None:
    place = build_workplace(tmp_path / "place")
    quick = ("trials=1", "study.plots=false", "study.bootstrap=20", "name=broken", "output=table.md")
    bound = "study.constraints={average/accuracy: {at_least: 2}}"  # which no trial keeps to
    done = place.cli("benchmark", "methods=[task_arithmetic,ties]", bound, *quick, timeout=600)
    assert done.returncode == 2
    assert "2 of 2 methods failed" in done.stderr
    assert "no trial keeps to study.constraints" in (place.directory / "table.md").read_text()
    run = next(run for run in place.runs().values() if run.data.tags.get("kind") == "benchmark")
    assert run.info.status == "FINISHED"


def test_a_mean_outside_of_the_interval_of_further_seeds_is_drawn() -> None:
    rows = [{"method": "random", "mean": 0.45, "low": 0.46, "high": 0.48}]
    assert ranking(rows, "average/accuracy").axes[0].get_yticklabels()[0].get_text() == "random"
