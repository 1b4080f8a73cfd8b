"""Statistics, losses and gradients against plain loops, on modules small enough to loop over."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import harness.adapt
from harness.adapt import (
    CoefficientObjective,
    Entropy,
    features,
    fisher_diagonals,
    gradient_magnitudes,
    gram_matrices,
    input_samples,
    train,
)
from harness.bench import open_bench
from harness.compose import compose
from harness.examples import Examples
from harness.execute import launch
from harness.make import Job, make
from harness.merge import Merge, merge
from harness.track import local_path
from methods.catalogue import find
from pools.roles import ModuleRoles


class Encoder(nn.Module):
    """Tokens (B, 4, 5) -> outputs (B, 3); `unused` is in no forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.outer = nn.Linear(6, 3, bias=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.norm(self.inner(tokens)))).mean(1)


class Feeds:
    """Rows are tensors already."""

    def feed(self, rows):
        return {"tokens": torch.stack(list(rows))}


def encoder(seed: int) -> Encoder:
    torch.manual_seed(seed)
    return Encoder().eval()


def examples(n: int, n_classes: int, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    rows = [(torch.randn(4, 5, generator=generator), index % n_classes) for index in range(n)]
    return Examples(rows, Feeds(), torch.randn(n_classes, 3, generator=generator), range(n))


@pytest.fixture(scope="module")
def fabric():
    return launch("cpu", 1, "32-true", 0)


def roles_of(module: nn.Module) -> ModuleRoles:
    return ModuleRoles(module, module.state_dict())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_gram_matrices_are_the_mean_over_all_tokens(fabric, batch_size):
    module, fed = encoder(0), examples(7, 2)
    found = gram_matrices(fabric, module, fed, batch_size, roles_of(module).is_linear)
    with torch.no_grad():
        tokens = torch.stack([row for row, _ in fed.rows])  # (7, 4, 5)
        inner = tokens.flatten(0, 1).double()
        outer = torch.tanh(module.norm(module.inner(tokens))).flatten(0, 1).double()
    assert set(found) == {"inner.weight", "outer.weight"}  # what no input reaches has no Gram matrix
    torch.testing.assert_close(found["inner.weight"], (inner.T @ inner / 28).float())
    torch.testing.assert_close(found["outer.weight"], (outer.T @ outer / 28).float())
    assert not module.inner._forward_pre_hooks


@pytest.mark.parametrize("batch_size", [2, 100])
def test_fisher_is_a_plain_loop_over_examples_and_classes(fabric, batch_size):
    module, fed = encoder(0), examples(5, 3)
    found = fisher_diagonals(fabric, module, fed, batch_size, roles_of(module).is_linear)
    wanted = {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}
    for row, _ in fed.rows:
        chances = torch.softmax(module(row[None]) @ fed.head.T, 1)[0].detach()
        for label in range(3):
            module.zero_grad()
            torch.log_softmax(module(row[None]) @ fed.head.T, 1)[0, label].backward()
            for name, weight in module.named_parameters():
                if weight.grad is not None:
                    wanted[name] += chances[label] * weight.grad**2 / 5
    assert set(found) == set(wanted)
    for name, diagonal in wanted.items():
        torch.testing.assert_close(found[name], diagonal, rtol=1e-4, atol=1e-7)
    assert wanted["inner.weight"].max() > 1e-3
    assert found["unused.weight"].abs().max() == 0


def test_features_are_gram_matrices_and_what_scales_scale(fabric):
    module, fed = encoder(0), examples(7, 2)
    is_linear = roles_of(module).is_linear
    with torch.no_grad():
        module.norm.weight.mul_(3)  # which the features are taken before
        module.norm.bias.add_(1)
        entering = module.inner(torch.stack([row for row, _ in fed.rows])).flatten(0, 1)  # (28, 6)
    found, grams = features(fabric, module, fed, 3, is_linear), gram_matrices(fabric, module, fed, 3, is_linear)
    assert set(found) == {*grams, "norm.weight"}
    assert all(torch.equal(found[name], gram) for name, gram in grams.items())
    normal = (entering - entering.mean(1, keepdim=True)) / (entering.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found["norm.weight"], normal.square().mean(0), rtol=1e-4, atol=1e-5)


def test_gram_matrices_of_chosen_layers_only(fabric):
    module = encoder(0)
    found = gram_matrices(fabric, module, examples(3, 2), 2, lambda name: name == "outer.weight")
    assert set(found) == {"outer.weight"}


@pytest.mark.parametrize("batch_size", [2, 100])
def test_gradients_are_a_plain_loop_over_labelled_examples(fabric, batch_size):
    module, fed = encoder(0), examples(5, 3)
    found = gradient_magnitudes(fabric, module, fed, batch_size, roles_of(module).is_linear)
    wanted = {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}
    for row, label in fed.rows:
        module.zero_grad()
        nn.functional.cross_entropy(module(row[None]) @ fed.head.T, torch.tensor([label])).backward()
        for name, weight in module.named_parameters():
            if weight.grad is not None:
                wanted[name] += weight.grad.abs() / 5
    assert set(found) == set(wanted)
    for name, mean in wanted.items():
        torch.testing.assert_close(found[name], mean, rtol=1e-4, atol=1e-6)
    assert wanted["inner.weight"].max() > 1e-2


@pytest.mark.parametrize(("n", "sampled"), [(5, 20), (5, 12), (9, 4), (1, 3)])
def test_samples_are_inputs_of_every_example_alike(fabric, n, sampled, monkeypatch):
    """Whatever the size of batches; as many rows for every task, so that they can be stacked."""
    monkeypatch.setattr(harness.adapt, "SAMPLED", sampled)
    module, fed = encoder(0), examples(n, 2)
    found = input_samples(fabric, module, fed, 3, roles_of(module).is_linear)
    assert {name: tuple(sample.shape) for name, sample in found.items()} == {
        "inner.weight": (sampled, 5),
        "outer.weight": (sampled, 6),
    }
    owners = [
        next(i for i, (tokens, _) in enumerate(fed.rows) if (tokens == row).all(1).any())
        for row in found["inner.weight"]
    ]
    counts = [owners.count(index) for index in range(n)]
    assert max(counts) - min(counts) <= 1
    for size in (1, 100):
        again = input_samples(fabric, module, fed, size, roles_of(module).is_linear)
        for name, sample in found.items():
            torch.testing.assert_close(again[name], sample, rtol=1e-5, atol=1e-6)


def test_samples_are_of_all_places_in_an_example(fabric, monkeypatch):
    monkeypatch.setattr(harness.adapt, "SAMPLED", 40)
    module, fed = encoder(0), examples(1, 2)
    found = input_samples(fabric, module, fed, 3, roles_of(module).is_linear)["inner.weight"]
    counts = [int((found == token).all(1).sum()) for token in fed.rows[0][0]]
    assert sum(counts) == 40
    assert min(counts) >= 8


def test_entropy_is_that_of_the_next_batches_summed_over_tasks(fabric):
    module, tasks = encoder(0), {"a": examples(5, 3, seed=1), "b": examples(4, 2, seed=2)}
    loss = Entropy(fabric, tasks, batch_size=10, seed=0)  # larger than the tasks: all rows each time
    value = loss(lambda inputs: module(**inputs))
    wanted = 0.0
    for fed in tasks.values():
        for row, _ in fed.rows:
            chances = torch.softmax(module(row[None]) @ fed.head.T, 1)[0].tolist()
            wanted -= sum(chance * math.log(chance) for chance in chances) / len(fed)
    assert value == pytest.approx(wanted, rel=1e-5)
    assert module.inner.weight.grad is not None


def test_entropy_comes_to_every_example(fabric):
    fed = examples(5, 2)
    loss, seen = Entropy(fabric, {"a": fed}, batch_size=2, seed=0), []

    def forward(inputs):
        seen.extend(inputs["tokens"])
        return torch.zeros(len(inputs["tokens"]), 3, requires_grad=True)

    for _ in range(5):
        assert loss(forward) == pytest.approx(math.log(2))
    assert len(seen) == 10
    for row, _ in fed.rows:
        assert sum(torch.equal(row, each) for each in seen) == 2


@pytest.fixture
def objective(fabric):
    """Objective, and what it is of: base, experts, groups, examples."""
    base = {name: tensor.detach() for name, tensor in encoder(0).named_parameters() if "unused" not in name}
    experts = {str(seed): {name: encoder(seed).state_dict()[name] for name in base} for seed in (1, 2)}
    tasks = {"a": examples(6, 3, seed=1), "b": examples(6, 2, seed=2)}
    groups = {name: int(name.startswith("outer")) for name in base}
    made = CoefficientObjective(
        fabric, encoder(0), base, experts, groups.__getitem__, Entropy(fabric, tasks, batch_size=10, seed=0)
    )
    return made, base, experts, groups, tasks


def test_a_coefficients_gradient_is_autograds_through_the_merge(objective):
    made, base, experts, groups, tasks = objective
    at = torch.tensor([[0.3, -0.2], [0.7, 0.4]])
    value, gradient = made(at)
    coefficients = at.clone().requires_grad_()
    merged = {
        name: tensor + sum(
            coefficients[groups[name], index] * (expert[name] - tensor) for index, expert in enumerate(experts.values())
        )
        for name, tensor in base.items()
    }  # fmt: skip
    loss = torch.zeros(())
    for fed in tasks.values():
        outputs = torch.func.functional_call(encoder(0), merged, (torch.stack([row for row, _ in fed.rows]),))
        logits = outputs @ fed.head.T
        loss = loss - (torch.softmax(logits, 1) * torch.log_softmax(logits, 1)).sum() / len(fed)
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, coefficients.grad, rtol=1e-4, atol=1e-6)


def test_a_coefficients_gradient_is_the_slope_of_the_loss(objective):
    made = objective[0]
    at, step = torch.tensor([[0.3, -0.2], [0.7, 0.4]]), 1e-2
    gradient = made(at)[1]
    for group, expert in ((0, 0), (0, 1), (1, 0), (1, 1)):
        moved = torch.zeros(2, 2)
        moved[group, expert] = step
        slope = (made(at + moved)[0] - made(at - moved)[0]) / (2 * step)
        assert float(gradient[group, expert]) == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_train_moves_only_what_is_trainable_and_lowers_the_loss(fabric):
    module, losses = encoder(0), []
    module.inner.requires_grad_(False)
    before = module.inner.weight.clone()
    loss = Entropy(fabric, {"a": examples(8, 3)}, batch_size=8, seed=0)
    train(fabric, module, loss, lr=1e-2, steps=30, report=lambda step, value, _: losses.append((step, value)))
    assert [step for step, _ in losses] == list(range(30))
    assert losses[-1][1] < 0.7 * losses[0][1]
    assert torch.equal(module.inner.weight, before)


def test_train_stops_when_the_loss_is_no_number(fabric):
    module = encoder(0)
    loss = Entropy(fabric, {"a": examples(8, 3)}, batch_size=8, seed=0)
    with torch.no_grad():
        module.outer.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not a number at step 0; a smaller lr than"):
        train(fabric, module, loss, lr=1e-2, steps=3, report=lambda *_: None)


@pytest.mark.parametrize("granularity", ["task", "layer", "tensor"])
def test_adamerging_lowers_the_entropy_of_the_inputs(workplace, granularity):
    given = ["method=adamerging", f"method.granularity={granularity}", "method.steps=40", "method.lr=0.05"]
    config = compose([*workplace.choices, *given, "adaptation.batch_size=12"])  # all rows in every batch
    bench = open_bench(config.pool, config.tasks, local_path)
    fabric = launch("cpu", 1, "32-true", 0)
    seen: list[tuple[float, torch.Tensor]] = []
    job = Job(
        find("adamerging"), config.method, bench, fabric, config.adaptation, 0,
        lambda step, loss, coefficients: seen.append((loss, coefficients)),
    )  # fmt: skip
    made = make(job)
    losses = [loss for loss, _ in seen]
    assert losses[-1] < losses[0] - 0.01
    assert (seen[0][1] == 0.3).all()
    assert len(made.coefficients) == {"task": 1, "layer": 4, "tensor": len(bench.pool.base)}[granularity]
    fed = bench.adaptation(config.adaptation, 0, bench.tasks)
    loss = Entropy(fabric, fed, batch_size=12, seed=0)
    merged = bench.pool.module(merge(made.merge))
    with torch.no_grad():
        plain = find("task_arithmetic").load_params()(scale=0.3)
        before = bench.pool.module(merge(Merge(find("task_arithmetic"), plain, job.inputs)))
    at_start, at_end = loss(lambda inputs: before(**inputs)), loss(lambda inputs: merged(**inputs))
    assert at_start == pytest.approx(losses[0], rel=1e-4)
    assert at_end < at_start - 0.01
