"""Every catalogue row that is fed data, on tiny pools of every family: what it makes of them in a few steps.

python -m tests.harness.learners DEVICES OUT DIRECTORY...      of each directory's pool and tasks, by all rows in turn
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from harness.adapt import FROM_TEXTS
from harness.bench import Bench, open_bench
from harness.compose import compose
from harness.execute import launch
from harness.make import Job, Made, make
from harness.merge import merge
from harness.track import local_path
from methods.catalogue import CATALOGUE, find
from methods.kinds import Kind, Row

FED = [row for row in CATALOGUE.values() if row.kind in (Kind.search, Kind.build, Kind.informed) and row.data]
STEPPED = [row for row in FED if row.loss]  # the others look once
FEW = {"steps": 4, "adamerging_steps": 3, "rounds": 2, "inner_steps": 2}

_SUMS: dict[str, list[Any]] = {"prompt": [f"{n}+{n}=" for n in range(5)], "target": [str(2 * n) for n in range(5)]}
_MOODS: dict[str, list[Any]] = {"text": ["good", "bad", "poor", "so", "well"], "label": [0, 1, 1, 0, 0]}
_TASTES: dict[str, list[Any]] = {"text": ["sweet", "sour", "hot", "so", "bad"], "label": [0, 1, 2, 0, 1]}
DATA: dict[str, tuple[str, dict[str, list[Any]], dict[str, Any]]] = {  # task: kind, columns, settings
    "words": ("perplexity", {"text": ["some text", "other words", "a third", "", "one more"]}, {}),
    "sums": ("exact_match", _SUMS, {"max_new_tokens": 3}),
    "doubles": ("exact_match", _SUMS, {"max_new_tokens": 3}),
    "mood": ("text_classification", _MOODS, {"labels": ["a", "b"]}),
    "taste": ("text_classification", _TASTES, {"labels": ["a", "b", "c"]}),
}
FAMILIES = {  # kind of model: its pool's family, the class that transformers makes, experts and tasks
    "gpt2": ("causal_lm", "AutoModelForCausalLM", ["words", "sums"]),
    "qwen2": ("causal_lm", "AutoModelForCausalLM", ["words", "sums"]),
    "t5": ("seq2seq", "AutoModelForSeq2SeqLM", ["sums", "doubles"]),
    "bert": ("sequence_classification", "AutoModelForSequenceClassification", ["mood", "taste"]),
}


def write_language(root: Path, kind: str) -> dict[str, Any]:
    """Base, two experts, their tasks; returns what a pool is given, and writes pool.yaml and tasks.yaml in `work`."""
    import datasets

    from tests.pools.language_models import write_model

    family, auto, names = FAMILIES[kind]
    told = {}
    for seed, name in enumerate(["base", *names]):
        labels = DATA[name][2].get("labels") if name != "base" else None
        write_model(root / name, kind, seed, auto, **({"num_labels": len(labels)} if labels else {}))
    for name in names:
        own, columns, more = DATA[name]
        (root / f"data_{name}").mkdir()
        datasets.Dataset.from_dict(columns).to_parquet(root / f"data_{name}" / "test.parquet")
        splits = dict.fromkeys(("train", "validation", "test"), "test")
        told[name] = {"path": str(root / f"data_{name}"), "kind": own, "splits": splits, **more}
    pool = {"family": family, "base": "base", "experts": {name: name for name in names}, "root": str(root)}
    (root / "work").mkdir()
    (root / "work" / "pool.yaml").write_text(yaml.safe_dump(pool, sort_keys=False))
    (root / "work" / "tasks.yaml").write_text(yaml.safe_dump({"tasks": told}, sort_keys=False))
    return pool


def fit(row: Row, family: str) -> bool:
    """Whether a row is for a family: some are for images only, as are some statistics; some for mixtures of experts."""
    if row.stats == "routed":
        return False
    return family == "clip" or ("images" not in row.data and (not row.stats or row.stats in FROM_TEXTS))


def few(row: Row) -> list[str]:
    """Overrides with which a row takes a moment."""
    known = {field.name for field in dataclasses.fields(row.load_params())}
    return [f"method.{name}={value}" for name, value in FEW.items() if name in known]


OPENED: dict[tuple[str, ...], Bench] = {}


def job_of(choices: Iterable[str], row: Row, *overrides: str, report: Callable[..., None] = lambda *_: None,
           fabric: Any = None) -> Job:  # fmt: skip
    """A row's merge of a pool, which is opened once."""
    chosen = tuple(choices)
    config = compose([*chosen, f"method={row.name}", *few(row), "adaptation.batch_size=4", *overrides])
    bench = OPENED.get(chosen) or open_bench(config.pool, config.tasks, local_path)
    OPENED[chosen] = bench
    return Job(
        find(row.name), config.method, bench, fabric or launch("cpu", 1, "32-true", 0), config.adaptation, config.seed,
        report,
    )  # fmt: skip


def tensors_of(made: Made) -> dict[str, torch.Tensor]:
    """All that was made: weights, and coefficients where there are some."""
    weights: Mapping[str, torch.Tensor] = merge(made.merge) if made.merge is not None else made.module.state_dict()  # type: ignore[union-attr]
    found = {f"coefficients of {group}": values for group, values in (made.coefficients or {}).items()}
    return found | {name: tensor.detach().clone() for name, tensor in weights.items()}


def _all(devices: int, out: Path, directories: list[Path]) -> None:
    torch.set_num_threads(1)
    fabric = launch("cpu", devices, "32-true", 0)
    found = {}
    for directory in directories:
        choices = f"pool={directory / 'pool.yaml'}", f"tasks={directory / 'tasks.yaml'}"
        for row in FED:
            print(directory.parent.name, row.name, file=sys.stderr, flush=True)
            if fit(row, yaml.safe_load((directory / "pool.yaml").read_text())["family"]):
                found[f"{directory.parent.name}/{row.name}"] = tensors_of(make(job_of(choices, row, fabric=fabric)))
        if fabric.is_global_zero:  # so that a look is possible on the way
            torch.save(found, out)
    fabric.barrier()


if __name__ == "__main__":
    _all(int(sys.argv[1]), Path(sys.argv[2]), [Path(own) for own in sys.argv[3:]])
