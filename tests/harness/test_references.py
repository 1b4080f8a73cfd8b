"""What base and experts reach is computed once, and again when anything that it depends on has changed."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import references as module
from harness.bench import open_bench
from harness.compose import compose
from harness.execute import launch
from harness.references import references
from harness.track import local_path

TASKS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def fabric():
    return launch("cpu", 1, "32-true", 0)


@pytest.fixture
def scored(monkeypatch, tmp_path):
    """An empty cache, and the list of what was scored rather than read from it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names, real = [], module.score

    def score(fabric, own, task, *rest):
        names.append(task)
        return real(fabric, own, task, *rest)

    monkeypatch.setattr(module, "score", score)
    return names


def found(fabric, workplace, *overrides: str):
    config = compose([*workplace.choices, *overrides])
    bench = open_bench(config.pool, config.tasks, local_path)
    return references(fabric, bench, config.evaluation, config.seed)


def test_a_second_time_nothing_is_scored_and_the_numbers_are_the_same(fabric, workplace, scored):
    first = found(fabric, workplace)
    assert scored == [*TASKS, *TASKS]
    assert set(first.base) == set(first.experts) == set(TASKS)
    assert found(fabric, workplace) == first
    assert found(fabric, workplace, "evaluation.batch_size=7") == first
    assert len(scored) == 6


@pytest.mark.parametrize(
    "change", ["evaluation.split=validation", "evaluation.limit=9", "tasks.tasks.red.templates=['the {}']"]
)
def test_other_data_or_prompts_are_scored_anew(fabric, workplace, scored, change):
    found(fabric, workplace)
    found(fabric, workplace, change)
    assert len(scored) > 6


def test_an_expert_of_other_content_is_scored_anew(fabric, workplace, tmp_path, tiny_pool, scored):
    found(fabric, workplace)
    copy = tmp_path / "changed"
    shutil.copytree(tiny_pool.root / "blue", copy)
    assert found(fabric, workplace, f"pool.experts.blue={copy}").experts
    assert len(scored) == 6  # the same content under another name
    weights = load_file(copy / "model.safetensors")
    weights["pre_layrnorm.weight"] += torch.ones(16)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    found(fabric, workplace, f"pool.experts.blue={copy}")
    assert scored[6:] == ["blue"]


def test_a_spoilt_or_forbidden_cache_costs_time_only(fabric, workplace, tmp_path, scored):
    first = found(fabric, workplace)
    files = list((tmp_path / "cache").rglob("*.json"))
    assert len(files) == 6
    for file in files:
        file.write_text("{")
    assert found(fabric, workplace) == first
    assert len(scored) == 12
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert found(fabric, workplace) == first


def test_without_a_base_or_an_experts_task_there_is_less_to_compare_with(fabric, workplace, scored):
    assert set(found(fabric, workplace, "experts=[blue]").experts) == {"blue"}


def test_the_reference_of_an_expert_is_what_evaluating_it_gives(workplace):
    known = workplace.once("method=task_arithmetic").references
    quick = "tracking.log_model=false", "evaluation.plots=false"
    alone = workplace.run("method=expert", "method.expert=blue", *quick)
    assert alone.references == known
    assert {score.task: score.value for score in alone.scores}["blue"] == known.experts["blue"]
    base = workplace.run("method=base", *quick)
    assert {score.task: score.value for score in base.scores} == known.base
