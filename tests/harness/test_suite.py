"""The embedded suite as committed: it loads by the real classes, and its records are what the weights give."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from harness.bench import Bench, open_bench
from harness.compose import compose
from harness.config import ROOT, RunConfig
from harness.execute import launch
from harness.references import references
from harness.track import local_path

POOL, TASKS = ROOT / "pools" / "mini_clip8", ROOT / "tasks" / "mini_clip8"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose()


@pytest.fixture(scope="module")
def bench(config: RunConfig) -> Bench:
    return open_bench(config.pool, config.tasks, local_path)


def test_the_suite_is_small_and_holds_no_pickle() -> None:
    files = [path for place in (POOL, TASKS) for path in place.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".parquet", ".txt"}


def test_every_task_has_its_splits_and_an_expert(bench: Bench) -> None:
    assert len(bench.tasks) == 8
    assert list(bench.pool.experts) == list(bench.tasks)
    for task in bench.tasks.values():
        sizes = {split: len(task.rows(split)) for split in ("train", "validation", "test")}
        assert sizes["test"] >= 300
        assert sizes["validation"] >= 200
        assert sizes["train"] > sizes["test"]


def test_splits_share_no_picture(bench: Bench) -> None:
    for name, task in bench.tasks.items():
        test, train = ({image.tobytes() for image, _ in task.rows(split)} for split in ("test", "train"))
        assert not test & train, name


def test_recorded_accuracies_are_what_the_weights_give(bench: Bench, config: RunConfig, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing from an earlier run
    recorded = json.loads((POOL / "accuracies.json").read_text())
    fabric = launch("cpu", 1, "32-true", 0)
    found = references(fabric, bench, config.evaluation, config.seed)
    assert found.experts == pytest.approx(recorded["experts"], abs=1.5 / 400)  # a row may fall the other way elsewhere
    assert found.base == pytest.approx(recorded["base"], abs=1.5 / 400)
    experts, base = (math.fsum(found_in.values()) / 8 for found_in in (found.experts, found.base))
    assert experts >= 0.90
    assert 0.30 <= base <= 0.65


@pytest.mark.slow
def test_a_suite_is_built_and_loads(tmp_path: Path) -> None:
    from harness.suite import Recipe, build_suite

    scores = build_suite(
        tmp_path / "pool", tmp_path / "tasks", 1, Recipe(gallery_rows=60, base_steps=4, expert_steps=2)
    )
    assert set(scores["experts"]) == set(scores["base"]) == {path.name for path in TASKS.iterdir() if path.is_dir()}
    members = {name: f"experts/{name}" for name in scores["experts"]}
    shown = [f"pool.root={tmp_path / 'pool'}", f"tasks.root={tmp_path / 'tasks'}"]
    config = compose(shown)
    assert set(config.pool.experts) == set(members)
    opened = open_bench(config.pool, config.tasks, local_path)
    assert opened.pool.faults() == []
