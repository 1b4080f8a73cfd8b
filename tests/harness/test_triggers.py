"""Defences: perturbations stay within bounds and hurt, losses against plain loops, rows on real models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from harness.bench import open_bench
from harness.compose import compose
from harness.config import UserError
from harness.execute import launch
from harness.learn import Course, Merging, Saved, learn
from harness.losses import Shells, entropy
from harness.make import Job, make
from harness.merge import Merge, merge
from harness.objective import losses_of
from harness.searching import stacked, weights_of
from harness.track import local_path
from harness.triggers import Attacked, Shared, divergence, each, pixels_of, universal, within
from methods.awm import AwmParams, awm
from methods.catalogue import CATALOGUE, find
from methods.kinds import Place
from methods.safe_concrete import SafeConcreteTaskArithmeticParams
from methods.sau import SauParams
from tests.harness.test_adapt import encoder, examples, fabric  # noqa: F401
from tests.harness.test_learn import Own, language  # noqa: F401

ROWS = {  # settings in which a run takes a moment
    "safe_concrete_task_arithmetic": ("method.lr=0.1",),
    "safe_concrete_adamerging": ("method.lr=0.1", "method.adamerging_lr=0.05", "method.adamerging_steps=20"),
    "awm": ("method.lr=0.05",),
    "sau": ("method.lr=0.003",),
}
every = pytest.mark.parametrize("method", ROWS)
TASKS = {"a": examples(6, 3, seed=1), "b": examples(5, 2, seed=2)}


def linear(slope: torch.Tensor):
    """A loss whose gradient is the same everywhere."""
    return lambda perturbation: slope.expand_as(perturbation)


# -- perturbations -----------------------------------------------------------------------------------------------------


def test_the_nearest_within_a_sum_of_sizes() -> None:
    assert within(torch.tensor([[0.75, -0.75, 0.1]]), 1.0).tolist() == [[0.5, -0.5, 0.0]]
    inside = torch.tensor([[0.2, -0.3]])
    torch.testing.assert_close(within(inside, 1.0), inside)
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(4, 5, generator=generator)
    nearest = within(point, 2.0)
    assert float(nearest.abs().sum()) == pytest.approx(2.0, rel=1e-5)
    for _ in range(200):
        other = torch.randn(4, 5, generator=generator)
        other *= 2.0 / other.abs().sum()
        assert float((other - point).norm()) >= float((nearest - point).norm()) - 1e-5


def test_steps_of_a_universal_trigger_by_hand() -> None:
    """Of two values, 0.5 each on the mean: ascents of 1.25 in sum along (0.8, -0.2), brought back to a sum of 1."""
    slope = linear(torch.tensor([[4.0, -1.0]]))
    one = universal(slope, torch.zeros(1, 2), 2, 0.5)
    after = torch.tensor([1.0, -0.25]) - torch.tensor([0.125, -0.125])  # the first, back within
    again = after + torch.tensor([1.0, -0.25])
    torch.testing.assert_close(one[0], within(again[None], 1.0)[0])
    assert float(one.abs().sum()) == pytest.approx(1.0)
    assert universal(linear(torch.zeros(1, 2)), torch.zeros(1, 2), 3, 0.5).tolist() == [[0.0, 0.0]]  # nowhere to go


def test_steps_of_each_examples_own_by_hand() -> None:
    slope = linear(torch.tensor([[4.0, -1.0], [0.0, 0.1]]))
    assert each(slope, torch.zeros(2, 2), 5, 0.2)[0].tolist() == pytest.approx([0.2, -0.2])
    found = each(slope, torch.zeros(2, 2), 5, 0.2)[1].tolist()
    assert found == pytest.approx([0.0, 0.2])
    assert each(slope, torch.zeros(2, 2), 1, 0.2)[0].tolist() == pytest.approx([0.2, -0.2])  # never beyond


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("bound", [0.05, 0.5])
def test_they_stay_within_their_norm_and_raise_the_loss(steps: int, bound: float) -> None:
    module, fed = encoder(0), TASKS["a"]
    inputs, _ = fed.batch(range(6))
    tokens = inputs["tokens"]
    wanted = (module(tokens) @ fed.head.T).argmax(1)

    def loss(change: torch.Tensor) -> torch.Tensor:
        return cross_entropy(module(tokens + change) @ fed.head.T, wanted)

    def slope(change: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss(change), [change])[0]

    before = float(loss(torch.zeros(1)).detach())
    one = universal(slope, torch.zeros(1, 4, 5), steps, bound)
    assert one.shape == (1, 4, 5)
    assert 0 < float(one.abs().mean()) <= bound * (1 + 1e-5)
    assert float(loss(one).detach()) > before
    own = each(slope, torch.zeros(6, 4, 5), steps, bound)
    assert 0 < float(own.abs().max()) <= bound * (1 + 1e-6)
    assert float(loss(own).detach()) > before
    assert all(weight.grad is None for weight in module.parameters())


def test_divergence_by_hand() -> None:
    sure, even = torch.tensor([[60.0, 0.0]]), torch.zeros(1, 2)
    assert float(divergence(sure, -sure)) == pytest.approx(math.log(2))
    assert float(divergence(even, even)) == 0.0
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - math.log(2) / 2
    assert float(divergence(sure, even)) == pytest.approx(mixed)


def test_pixels_are_the_inputs_that_are_no_ids() -> None:
    assert pixels_of({"ids": torch.zeros(1, dtype=torch.int64), "pixel_values": torch.zeros(1)}) == "pixel_values"
    with pytest.raises(UserError, match="this model is fed ids; choose another method"):
        pixels_of({"ids": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(UserError, match="is fed a, b"):
        pixels_of({"a": torch.zeros(1), "b": torch.zeros(1)})


# -- losses ------------------------------------------------------------------------------------------------------------


def attacked(fabric, kind=Attacked, **params):  # noqa: F811
    made = SauParams if kind is Shared else SafeConcreteTaskArithmeticParams
    own = Own()
    return own, kind(fabric, TASKS, 10, 0, own, own.stack(), made(**params))


@pytest.mark.parametrize("loss", ["entropy", "labels"])
@pytest.mark.parametrize("penalty", ["agreement", "entropy"])
def test_a_universal_triggers_loss_is_a_plain_loop(fabric, loss, penalty) -> None:  # noqa: F811
    own, losses = attacked(fabric, loss=loss, penalty=penalty, adv_weight=0.7, adv_steps=3, trigger_norm=0.3)
    module, total = own.module, 0.0
    found = losses(lambda inputs: module(**inputs))
    for fed in TASKS.values():
        tokens = torch.stack([row for row, _ in fed.rows])
        logits = module(tokens) @ fed.head.T
        wanted = torch.tensor([label for _, label in fed.rows]) if loss == "labels" else logits.argmax(1)

        def slope(change, tokens=tokens, fed=fed, wanted=wanted):
            lost = cross_entropy(module(tokens + change) @ fed.head.T, wanted)
            return torch.autograd.grad(lost, [change])[0]

        after = module(tokens + universal(slope, torch.zeros(1, 4, 5), 3, 0.3)) @ fed.head.T
        clean = entropy(logits).mean() if loss == "entropy" else cross_entropy(logits, wanted)
        hurt = entropy(after).mean() if penalty == "entropy" else cross_entropy(after, wanted)
        total += float((clean + 0.7 * hurt).detach())
    assert found == pytest.approx(total, rel=1e-5)


def test_mistakes_that_are_shared_are_unlearnt(fabric) -> None:  # noqa: F811
    """Against a plain loop over examples: what the merge as it was mistakes, and how likely the model finds it."""
    own, losses = attacked(fabric, Shared, adv_weight=0.5, adv_steps=2, trigger_norm=1.0, scale=0.4)
    stack = own.stack()
    before = own.forward({name: base + 0.4 * stack.deltas[name].sum(0) for name, base in stack.base.items()})
    module, total, mistakes = own.module, 0.0, 0
    found = losses(lambda inputs: module(**inputs))
    for task, fed in TASKS.items():
        for row, label in fed.rows:
            wanted, change = torch.tensor([label]), torch.zeros(1, 4, 5)
            for _ in range(2):
                change = change.detach().requires_grad_()
                was, now = (
                    run(task, {"tokens": row + change}) @ fed.head.T
                    for run in (before, lambda _, inputs: module(**inputs))
                )
                gain = 0.01 * (cross_entropy(was, wanted) + cross_entropy(now, wanted)) / 2 - divergence(was, now).sum()
                uphill = torch.autograd.grad(gain, [change])[0].sign()
                change = (change.detach() + 1.25 * uphill).clamp(-1, 1)
            mistaken = int((before(task, {"tokens": row + change}) @ fed.head.T).argmax())
            chances = torch.softmax(module(row + change) @ fed.head.T, 1)[0]
            clean = float(cross_entropy(module(row[None]) @ fed.head.T, wanted).detach())
            mistakes += mistaken != label
            hurt = -math.log(1 - float(chances[mistaken].detach())) if mistaken != label else 0.0
            total += (clean + 0.5 * hurt) / len(fed)
    assert mistakes > 2
    assert found == pytest.approx(total, rel=1e-4)


def test_a_mistake_that_is_certain_still_has_a_slope(fabric) -> None:  # noqa: F811
    """Where 1 - p is zero in float32."""
    own, losses = attacked(fabric, Shared, trigger_norm=0.5)
    heads = {task: head.clone() for task, head in losses._heads.items()}
    losses._heads = {task: 1000 * head for task, head in heads.items()}
    weights = {name: own.module.get_parameter(name).clone().requires_grad_() for name in own.paths}
    value = losses.backward(own.forward(weights))
    assert math.isfinite(value)
    assert all(bool(torch.isfinite(weight.grad).all()) for weight in weights.values())
    assert float(weights["outer.weight"].grad.abs().max()) > 1


def test_a_process_without_rows_of_a_batch_counts_for_nothing(fabric) -> None:  # noqa: F811
    own, losses = attacked(fabric)
    losses._next = lambda: [("a", [], 3)]
    weights = {name: own.module.get_parameter(name).clone().requires_grad_() for name in own.paths}
    assert losses.backward(own.forward(weights)) == 0
    assert all(not weight.grad.any() for weight in weights.values())


def test_gone_on_with_it_ends_the_same_bit_for_bit(fabric, tmp_path) -> None:  # noqa: F811
    def learnt(steps, saved=None):
        own, params = Own(), AwmParams(lr=0.05, adv_steps=2, loss="entropy")
        plain = own.stack()
        stack = replace(plain, places=dict.fromkeys(plain.places, Place(linear=True)))
        losses, search = Attacked(fabric, TASKS, 4, 0, own, stack, params), awm(stack, params)
        learn(fabric, Merging(fabric, search, own), losses, Course("awm", steps, search.rates, saved=saved))
        return search.learnt

    whole = learnt(6)
    learnt(4, Saved(tmp_path, 2, False))
    again = learnt(6, Saved(tmp_path, 2, True))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    assert any(bool((tensor < 1).any()) for tensor in whole.values())


# -- rows --------------------------------------------------------------------------------------------------------------


def job_of(workplace, method, *given, report=lambda *_: None) -> Job:
    config = compose([*workplace.choices, f"method={method}", *given, "adaptation.batch_size=12"])
    bench, fabric = open_bench(config.pool, config.tasks, local_path), launch("cpu", 1, "32-true", 0)  # noqa: F811
    return Job(find(method), config.method, bench, fabric, config.adaptation, 0, report)


def made(workplace, method, *given, **how) -> dict[str, torch.Tensor]:
    return merge(make(job_of(workplace, method, *given, **how)).merge)


def test_the_rows_are_those_of_the_catalogue() -> None:
    assert set(ROWS) == {row.name for row in CATALOGUE.values() if row.adversary}


@pytest.mark.slow
@every
def test_what_is_learnt_beats_where_it_starts_on_the_loss_that_is_minimised(workplace, method) -> None:
    curve = []
    given = ("method.steps=20", "method.adv_steps=2", *ROWS[method])
    job = job_of(workplace, method, *given, report=lambda step, loss, _: curve.append(loss))
    done = merge(make(job).merge)
    fed = job.bench.adaptation(job.adaptation, 0, job.bench.tasks)
    shells = Shells(job.bench.pool, weights_of(job.inputs), fed, job.fabric.device)
    stack = stacked(job.inputs, shells, job.fabric.device)
    plain = find("task_arithmetic")
    start = merge(Merge(plain, plain.load_params()(scale=0.3), job.inputs))
    values = []
    for weights in (start, done):
        losses = losses_of(job.row, job.params, job.fabric, fed, 12, 0, shells, stack)
        module = job.bench.pool.module(weights)
        values.append(losses(lambda inputs, module=module: module(**inputs)))
    assert values[1] < values[0] - 0.002
    assert len(curve) == (40 if method == "safe_concrete_adamerging" else 20)


@pytest.mark.slow
@every
def test_equal_seeds_give_equal_bits(workplace, method) -> None:
    given = ("method.steps=3", *ROWS[method])
    one, again = made(workplace, method, *given), made(workplace, method, *given)
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())


@pytest.mark.parametrize("method", ["task_arithmetic", pytest.param("adamerging", marks=pytest.mark.slow)])
def test_without_the_penalty_it_is_the_concrete_mask_to_the_bit(workplace, method) -> None:
    given = ["method.steps=2", "method.lr=0.1", *(["method.adamerging_steps=3"] if method == "adamerging" else [])]
    plain = made(workplace, f"concrete_{method}", *given)
    free = made(workplace, f"safe_concrete_{method}", *given, "method.adv_weight=0")
    held = made(workplace, f"safe_concrete_{method}", *given, "method.adv_weight=1")
    assert all(torch.equal(tensor, free[name]) for name, tensor in plain.items())
    assert any(not torch.equal(tensor, held[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("method", ["awm", "sau"])
def test_one_model_that_was_merged_is_defended_on_the_inputs_of_every_task(
    workplace, build_workplace, tmp_path, method
):
    place = tmp_path / "merged"
    done = workplace.run(
        "method=task_arithmetic", f"output={place}", "tracking.log_model=false", "evaluation.references=false"
    )
    assert done.metrics
    alone = build_workplace(tmp_path / "work", {"experts": {"merged": str(place)}})
    given = ("method.steps=3", "method.lr=0.00001")  # Adam makes much of the last bit where a slope is zero
    job = job_of(alone, method, *given, "method.scale=1")
    found, wanted = merge(make(job).merge), made(workplace, method, *given)
    assert list(job.bench.pool.experts) == ["merged"]
    assert len(job.bench.tasks) == 3
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=6e-5, rtol=1e-4)


@pytest.mark.slow
@every
def test_two_processes_learn_what_one_learns(workplace, tmp_path, method) -> None:
    found = []
    for devices in (1, 2):
        place = tmp_path / str(devices)
        done = workplace.cli(
            "run", f"method={method}", "method.steps=3", "tracking.log_model=false", "evaluation.plots=false",
            f"output={place}", "evaluation.references=false", "fabric.accelerator=cpu", f"fabric.devices={devices}",
            *(["method.adamerging_steps=2"] if method == "safe_concrete_adamerging" else []),
            timeout=900,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        found.append({name: tensor for file in place.glob("*.safetensors") for name, tensor in load_file(file).items()})
    for name, tensor in found[0].items():
        if not name.endswith("k_proj.bias"):  # no output depends on it: its slope is rounding, which Adam enlarges
            torch.testing.assert_close(found[1][name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@every
def test_texts_are_refused_before_any_work(language, method) -> None:  # noqa: F811
    with language("bert").entered():
        job = job_of(language("bert"), method)
        with pytest.raises(UserError, match=r"fed tasks of kind image_classification only, not mood .*choose a method"):
            make(job)


@pytest.mark.parametrize("method", ["awm", "sau"])
def test_a_defence_needs_tasks(workplace, method) -> None:
    with pytest.raises(UserError, match=rf"{method} is fed the inputs of every task, and there is none"):
        make(job_of(workplace, method, "tasks=none"))
