"""What a compression learns from inputs: by the loop of all that learns, of every kind of task, gone on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
import yaml

from harness.bench import open_bench
from harness.checkpoint import Saved
from harness.compose import compose
from harness.compress import Packed, pack
from harness.distill import distilled
from harness.execute import launch
from harness.job import Merge
from harness.learn import Course
from harness.make import Job
from harness.track import local_path
from methods.catalogue import find
from tests.pools.language_models import write_model

pytestmark = pytest.mark.slow

STEPS = 4
TEXTS = {"text": ["some text", "other words", "a third one"] * 2}
MOODS = {"text": ["good", "bad", "fine"] * 2, "label": [0, 1, 0] * 2}
ASKED = {"prompt": [f"{k}+1=" for k in range(6)], "target": [str(k + 1) for k in range(6)]}
LIKED = {"chosen": ["good", "fine", "well"] * 2, "rejected": ["bad", "poor", "ill"] * 2}
CLASSIFIER = "AutoModelForSequenceClassification"
LANGUAGE = {
    "perplexity": ("causal_lm", "llama", "AutoModelForCausalLM", TEXTS, {}, {}),
    "exact_match": ("seq2seq", "t5", "AutoModelForSeq2SeqLM", ASKED, {"max_new_tokens": 3}, {}),
    "text_classification": ("sequence_classification", "bert", CLASSIFIER, MOODS, {"labels": ["good", "bad"]}, {}),
    "preference": ("sequence_classification", "bert", CLASSIFIER, LIKED, {}, {"num_labels": 1}),
}  # fmt: skip


@pytest.fixture
def open_job(tmp_path, build_workplace):
    """Makes jobs: bitdelta of two experts, of images or of a kind of language task."""

    def build(kind: str) -> Job:
        place = build_workplace(tmp_path / "work") if kind == "images" else language(tmp_path, build_workplace, kind)
        experts = "experts=[red,green]" if kind == "images" else "experts=[one,two]"
        config = compose([*place.choices, "method=bitdelta", "adaptation.examples=6", experts])
        bench = open_bench(config.pool, config.tasks, local_path)
        return Job(find("bitdelta"), config.method, bench, launch("cpu", 1, "32-true", 0), config.adaptation, 0)

    return build


def language(root: Path, build_workplace, kind: str):
    family, model, auto, columns, settings, config = LANGUAGE[kind]
    for seed, name in enumerate(("base", "one", "two")):
        write_model(root / name, model, seed, auto, **config)
    data = root / "data"
    data.mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(data / "train.parquet")
    pool = {"family": family, "base": str(root / "base"), "experts": {n: str(root / n) for n in ("one", "two")}}
    place = build_workplace(root / "work", pool)
    splits = dict.fromkeys(("train", "validation", "test"), "train")
    task = {"path": str(data), "kind": kind, "splits": splits, **settings}
    (place.directory / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {"one": task, "two": task}}))
    return place


def learnt(job: Job, **changes) -> tuple[Packed, Packed, list[float]]:
    """What was packed, what became of it, and every step's loss."""
    losses: list[float] = []
    rough = pack(Merge(job.row, job.params, job.inputs))
    fed = job.bench.adaptation(job.adaptation, 0, list(job.bench.pool.experts), texts=True)
    course = Course("bitdelta", STEPS, 1e-2, lambda step, loss, shown: losses.append(loss))
    return rough, distilled(job.fabric, rough, job.bench.pool, fed, 3, replace(course, **changes)), losses


@pytest.mark.parametrize("kind", ["images", *LANGUAGE])
def test_scales_alone_are_learnt_and_the_loss_falls(open_job, kind) -> None:
    rough, found, losses = learnt(open_job(kind), steps=12, lr=1e-3)
    assert len(losses) == 24
    for own in (losses[:12], losses[12:]):
        assert sum(own[-4:]) < sum(own[:4])
    changed = {
        name.rpartition("/")[2] for name in rough.tensors if not torch.equal(rough.tensors[name], found.tensors[name])
    }
    assert changed == {"scales"}


def test_an_interrupted_distillation_is_gone_on_with_to_the_same_bits(open_job, tmp_path) -> None:
    job = open_job("images")
    _, whole, losses = learnt(job)
    saved = Saved(tmp_path / "kept", 1, True, {"method": "bitdelta"})
    past: list[float] = []

    def interrupted(step: int, loss: float, shown: torch.Tensor | None) -> None:
        if step == STEPS + 2:  # of the second expert
            raise KeyboardInterrupt
        past.append(loss)

    with pytest.raises(KeyboardInterrupt):
        learnt(job, saved=saved, report=interrupted)
    assert past == losses[: STEPS + 2]
    assert sorted(each.name for each in (tmp_path / "kept").iterdir()) == ["green", "red"]
    _, found, again = learnt(job, saved=saved)
    assert again == losses
    assert all(torch.equal(whole.tensors[name], found.tensors[name]) for name in whole.tensors)


def test_a_loss_that_is_no_number_stops_with_its_step(open_job) -> None:
    with pytest.raises(FloatingPointError, match="the loss is not a number at step 1"):
        learnt(open_job("images"), lr=1e30)
