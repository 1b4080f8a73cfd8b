"""Methods that find the coefficients of a rule in their own way, on real models; their contract: test_every_learner."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

import harness.matching
from harness.bench import open_bench
from harness.compose import compose
from harness.config import UserError
from harness.execute import launch
from harness.inputs import MergeError
from harness.losses import Losses, Shells
from harness.make import Job, Made, make
from harness.matching import Matching, Whole, blocks
from harness.merge import merge
from harness.objective import Objective
from harness.searching import stacked, weights_of
from harness.track import local_path
from methods.catalogue import CATALOGUE, find
from methods.expert_merging import ExpertMergingParams
from tests.pools.language_models import write_model

SMALL = {  # settings in which a run takes a moment
    "fw_merging": ("method.steps=3",),
    "gossip": ("method.rounds=2", "method.steps=3", "method.lr=0.05"),
    "lorahub": ("method.steps=12",),
    "expert_merging": ("method.steps=6",),
}


class Place:
    """A pool and its tasks, opened for a method."""

    def __init__(self, choices: tuple[str, ...], method: str, *overrides: str) -> None:
        self.config = compose([*choices, f"method={method}", *SMALL[method], "adaptation.batch_size=5", *overrides])
        self.bench = open_bench(self.config.pool, self.config.tasks, local_path)
        self.fabric = launch("cpu", 1, "32-true", 0)
        self.told: list[tuple[int, float, torch.Tensor]] = []
        self.job = Job(
            find(method), self.config.method, self.bench, self.fabric, self.config.adaptation, self.config.seed,
            lambda *told: self.told.append(told),
        )  # fmt: skip
        self.fed = self.bench.adaptation(self.config.adaptation, 0, self.bench.tasks, texts=True)
        self.shells = Shells(self.bench.pool, weights_of(self.job.inputs), self.fed, self.fabric.device)
        self.stack = stacked(self.job.inputs, self.shells, self.fabric.device)

    def made(self) -> Made:
        """What the harness makes of it."""
        return make(self.job)

    def objective(self, losses: Losses, granularity: str = "layer") -> Objective:
        """A loss of coefficients."""
        return Objective(self.fabric, self.stack, granularity, self.shells, losses)

    def whole(self, size: int) -> Whole:
        """All examples, some at a time."""
        return Whole(self.fabric, self.fed, size, 0, "labels")

    def matching(self, size: int = 5, **params: Any) -> Matching:
        """The distance from the experts."""
        return Matching(self.fabric, self.fed, size, self.shells, self.stack, ExpertMergingParams(**params))


@pytest.fixture
def place(workplace) -> Iterator[Place]:
    return Place(workplace.choices, "fw_merging")


def test_the_methods_are_those_of_the_catalogue() -> None:
    assert set(SMALL) == {row.name for row in CATALOGUE.values() if row.rule}


@pytest.mark.parametrize(
    "method", [name if name == "fw_merging" else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_what_is_found_beats_the_start_and_is_merged(workplace, method: str) -> None:
    place = Place(workplace.choices, method)
    made = place.made()
    losses = [loss for _, loss, _ in place.told]
    params = place.config.method
    assert len(losses) == params.evaluations(3)
    found = torch.stack(list(made.coefficients.values()))
    if place.job.row.whole:
        assert min(losses) < losses[0]
        kept = next(own for _, loss, own in place.told if loss == min(losses))
        assert torch.equal(found, kept)
    else:  # one batch of each task a step: compared on all inputs, with the average that it starts from
        entropies = Whole(place.fabric, place.fed, 20, 0, "entropy")
        asked = place.objective(entropies, params.granularity)
        assert asked(found, slope=False)[0] < asked(torch.full_like(found, 1 / 3), slope=False)[0]
    objective = place.objective(place.whole(5), params.granularity)
    merged = merge(made.merge)
    for name, base in place.stack.base.items():
        expected = base + torch.tensordot(found[objective.group_of[name]], place.stack.deltas[name], dims=1)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fw_merging", "gossip", "expert_merging"])
def test_copies_of_one_expert_give_that_expert(build_workplace, tiny_pool, tmp_path, method: str) -> None:
    pool = {"experts": dict.fromkeys(("red", "green", "blue"), tiny_pool.experts["green"])}
    workplace = build_workplace(tmp_path, pool)
    with workplace.entered():
        place = Place(workplace.choices, method)
        merged, expert = merge(place.made().merge), place.bench.pool.experts["green"]
    for name in merged:
        torch.testing.assert_close(merged[name], expert[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["lorahub", "expert_merging"])
def test_too_few_examples_are_refused(workplace, method: str) -> None:
    place = Place(workplace.choices, method, "adaptation.examples=4")
    with pytest.raises(UserError, match=rf"{method} learns from 5 examples of each task at least; red has 4, "):
        place.made()
    assert not place.told


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("gossip", "method.node=3", "node is one of 0 to 2, one for each expert; got 3"),
        ("expert_merging", "method.weights=[1.0,2.0]", "weights lists 2 numbers for 3 experts"),
    ],
)
def test_what_does_not_fit_the_experts_is_refused(workplace, method: str, override: str, message: str) -> None:
    with pytest.raises((UserError, MergeError), match=message):
        Place(workplace.choices, method, override).made()


# -- losses ------------------------------------------------------------------------------------------------------------


def test_all_examples_count_whatever_the_batch(place: Place) -> None:
    at = torch.full(place.objective(place.whole(5)).shape, 0.3)
    values = [place.objective(place.whole(size))(at) for size in (1, 5, 100)]
    for loss, slope in values[1:]:
        assert loss == pytest.approx(values[0][0], rel=1e-5)
        torch.testing.assert_close(slope, values[0][1], rtol=1e-3, atol=1e-5)
    objective = place.objective(place.whole(5))
    assert objective(at)[0] == objective(at)[0]  # no batch is the next
    assert objective(at, slope=False)[0] == pytest.approx(values[0][0], rel=1e-5)
    module = place.bench.pool.module(
        {name: base + 0.3 * place.stack.deltas[name].sum(0) for name, base in place.stack.base.items()}
    )
    wanted = 0.0
    for examples in place.fed.values():
        inputs, labels = examples.batch(range(len(examples)))
        wanted += cross_entropy(module(**inputs) @ examples.head.T, labels).item()
    assert values[0][0] == pytest.approx(wanted, rel=1e-4)


def test_the_tasks_asked_for_count_and_batches_go_on(place: Place) -> None:
    def asked() -> Objective:
        return place.objective(Losses(place.fabric, place.fed, 4, 0, "entropy"))

    objective, whole = asked(), asked()
    at = torch.full(objective.shape, 0.3)
    apart = [asked()(at, tasks=[index]) for index in range(3)]
    loss, slope = whole(at)
    assert loss == pytest.approx(sum(each for each, _ in apart), rel=1e-5)
    torch.testing.assert_close(slope, sum(each for _, each in apart), rtol=1e-3, atol=1e-5)
    objective(at, tasks=[1])
    assert objective(at)[0] == pytest.approx(whole(at)[0], rel=1e-5)  # the second batch of every task


def test_blocks_are_found_by_depth(place: Place) -> None:
    module = place.bench.pool.module()
    assert [type(module.get_submodule(path)).__name__ for path in blocks(module)] == ["CLIPEncoderLayer"] * 2
    assert blocks(torch.nn.Linear(2, 2)) == []


def test_the_distance_from_experts_by_hand(place: Place) -> None:
    """Hidden states by hooks on modules of their own, answers by probabilities."""
    params = {"temperature": 2.0, "hidden": 0.5, "weights": [1.0, 2.0, 0.5]}
    objective = place.objective(place.matching(**params), "task")
    pool, coefficients = place.bench.pool, torch.tensor([[0.5, 0.2, 0.1]])
    mixed = {
        name: base + torch.tensordot(coefficients[0], place.stack.deltas[name], dims=1)
        for name, base in place.stack.base.items()
    }

    def shown(tensors: Any, inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        module, seen = pool.module(tensors), []
        for path in blocks(module):
            module.get_submodule(path).register_forward_hook(
                lambda layer, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
        with torch.no_grad():
            return module(**inputs), seen

    wanted = 0.0
    for weight, (task, examples) in zip(params["weights"], place.fed.items(), strict=True):
        inputs, _ = examples.batch(range(len(examples)))
        (own, mine), (other, theirs) = shown(mixed, inputs), shown(pool.experts[task], inputs)
        p, q = (torch.softmax(out @ examples.head.T / 2, 1) for out in (other, own))
        answers = 4 * (p * (p / q).log()).sum(1).mean()
        hidden = torch.stack([(a - b).square().mean() for a, b in zip(mine, theirs, strict=True)]).mean()
        wanted += weight * (answers + 0.5 * hidden).item()
    assert objective(coefficients)[0] == pytest.approx(wanted, rel=1e-3)


def test_the_distances_slope_is_the_slope(place: Place) -> None:
    objective = place.objective(place.matching(), "task")
    at = torch.tensor([[0.4, 0.3, 0.2]])
    slope = objective(at)[1]
    for index in range(3):
        moved = torch.zeros(1, 3)
        moved[0, index] = 1e-2
        found = (objective(at + moved, slope=False)[0] - objective(at - moved, slope=False)[0]) / 2e-2
        assert float(slope[0, index]) == pytest.approx(found, rel=5e-2, abs=1e-4)


def test_what_experts_show_is_kept_as_far_as_there_is_room(place: Place, monkeypatch) -> None:
    at = torch.full(place.objective(place.whole(5)).shape, 0.3)
    kept = place.matching()
    value = place.objective(kept)(at)[0]
    assert len(kept._kept) == sum(-(-len(examples) // 5) for examples in place.fed.values())
    monkeypatch.setattr(harness.matching, "KEPT_BYTES", 0)
    again = place.matching()
    objective = place.objective(again)
    assert objective(at)[0] == objective(at)[0] == value
    assert not again._kept


def test_a_model_without_blocks_is_told(place: Place) -> None:
    shells = copy.copy(place.shells)
    shells.modules = dict.fromkeys(place.fed, torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"no numbered blocks whose hidden states could be seen; use method\.hidden=0"):
        Matching(place.fabric, place.fed, 5, shells, place.stack, ExpertMergingParams())


# -- language models ---------------------------------------------------------------------------------------------------

WORDS = {"text": ["some text", "other words", "a third", "", "one more", "the last"]}
SUMS = {"prompt": [f"{n}+{n}=" for n in range(6)], "target": [str(2 * n) for n in range(6)]}
MOODS = {"text": ["good", "bad", "fine", "poor", "well", "ill"], "label": [0, 1, 0, 1, 0, 1]}
ASKED = {"kind": "exact_match", "max_new_tokens": 3}
FAMILIES = {  # family: kind of model, class, tasks
    "causal_lm": ("llama", "AutoModelForCausalLM", {"one": (WORDS, {"kind": "perplexity"}), "two": (SUMS, ASKED)}),
    "seq2seq": ("t5", "AutoModelForSeq2SeqLM", {"one": (SUMS, ASKED), "two": (SUMS, ASKED)}),
    "sequence_classification": (
        "bert", "AutoModelForSequenceClassification",
        dict.fromkeys(("one", "two"), (MOODS, {"kind": "text_classification", "labels": ["up", "down"]})),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_are_searched_alike(build_workplace, tmp_path, family: str) -> None:
    """Of every expert's own answers the loss is zero at that expert, and what is found beats the start."""
    kind, auto, tasks = FAMILIES[family]
    for seed, name in enumerate(("base", *tasks)):
        write_model(tmp_path / name, kind, seed, auto)
    data = {}
    for name, (columns, how) in tasks.items():
        (tmp_path / f"data_{name}").mkdir()
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"data_{name}" / "test.parquet")
        splits = dict.fromkeys(("train", "validation", "test"), "test")
        data[name] = {"path": str(tmp_path / f"data_{name}"), "splits": splits, **how}
    pool = {"family": family, "root": str(tmp_path), "base": "base", "experts": {name: name for name in tasks}}
    workplace = build_workplace(tmp_path / "work")
    (workplace.directory / "pool.yaml").write_text(yaml.safe_dump(pool))
    (workplace.directory / "tasks.yaml").write_text(yaml.safe_dump({"tasks": data}))
    with workplace.entered():
        place = Place(workplace.choices, "expert_merging", "method.lr=0.05", "method.gamma=0")
        place.made()
        losses = [loss for _, loss, _ in place.told]
        assert min(losses) < losses[0]
        objective = place.objective(place.matching(size=4), "task")
        for index in range(2):
            at = torch.eye(2)[index : index + 1]
            own, other = objective(at, tasks=[index])[0], objective(at, tasks=[1 - index])[0]
            assert abs(own) < 1e-6 < other
        whole = [place.objective(place.whole(size), "task")(torch.full((1, 2), 0.5))[0] for size in (4, 100)]
        assert whole[0] == pytest.approx(whole[1], rel=1e-4)  # other rows padded together
