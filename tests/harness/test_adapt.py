"""Statistics against plain loops, on modules small enough to loop over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import harness.adapt
from harness.adapt import features, fisher_diagonals, gradient_magnitudes, gram_matrices, input_samples
from harness.examples import Examples
from harness.execute import launch
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
