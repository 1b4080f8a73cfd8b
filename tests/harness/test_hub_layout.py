"""The field's standard benchmark by its configuration, on small stand-ins in a directory laid out like the hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.bench import Bench, open_bench
from harness.compose import compose
from harness.config import RunConfig, TaskSettings
from harness.track import local_path
from tests.conftest import write_tiny_clip, write_tiny_expert

ROWS = 20


def write_rows(place: Path, task: TaskSettings) -> None:
    """A data set repository: parquet under data/, the configurations in README.md as the hub has them."""
    import datasets

    names = task.labels or ["one", "two", "three"]
    features = datasets.Features({task.image: datasets.Image(), task.label: datasets.ClassLabel(names=names)})
    generator = np.random.default_rng(0)
    folder = place / (task.subset or "data")
    folder.mkdir(parents=True)
    splits = sorted({expression.partition("[")[0] for expression in task.splits.values()})
    for split in splits:
        images = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(ROWS)]
        labels = [index % len(names) for index in range(ROWS)]
        rows = datasets.Dataset.from_dict({task.image: images, task.label: labels}, features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {split}\n    path: {folder.name}/{split}-*\n" for split in splits)
    card = f"---\nconfigs:\n- config_name: {task.subset or 'default'}\n  data_files:\n{files}---\n"
    (place / "README.md").write_text(card)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    config = compose(["pool=clip_vit_b32_ta8", "tasks=clip_ta8"])
    assert config.pool.base is not None
    write_tiny_clip(root / config.pool.base.partition("@")[0], longest_prompt=128)
    for seed, expert in enumerate(config.pool.experts.values(), start=1):
        write_tiny_expert(root / config.pool.base.partition("@")[0], root / expert.partition("@")[0], seed)
    for task in config.tasks.tasks.values():
        write_rows(root / task.path.partition("@")[0], task)
    return root


@pytest.fixture(scope="module")
def config(hub: Path) -> RunConfig:
    return compose(["pool=clip_vit_b32_ta8", "tasks=clip_ta8", f"pool.root={hub}", f"tasks.root={hub}"])


@pytest.fixture(scope="module")
def bench(config: RunConfig) -> Bench:
    return open_bench(config.pool, config.tasks, local_path)


def test_one_setting_reads_the_benchmark_from_a_directory(bench: Bench, config: RunConfig, hub: Path) -> None:
    assert len(bench.pool.experts) == len(bench.tasks) == 8
    assert list(bench.pool.experts) == list(bench.tasks), "an expert and its task have one name"
    assert all(hub in expert.path.parents for expert in bench.pool.experts.values())


def test_every_task_can_be_fed_and_has_a_head(bench: Bench, config: RunConfig) -> None:
    for name, task in bench.tasks.items():
        examples = bench.examples(name, "test", limit=2)
        inputs, labels = examples.batch([0, 1])
        assert (bench.pool.module()(**inputs) @ bench.head(name).T).shape == (2, len(task.labels)), name
        assert labels.max() < len(task.labels)


def test_validation_is_cut_from_train_and_apart_from_it(bench: Bench) -> None:
    for name, task in bench.tasks.items():
        if "[" in task._splits.splits["validation"]:
            train, validation = (
                {image.tobytes() for image, _ in task.rows(split)} for split in ("train", "validation")
            )
            assert len(validation) == ROWS // 10, name
            assert not train & validation, name
