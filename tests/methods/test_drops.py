"""Random numbers and the drops that they decide: uniform in sixteen bits, of the asked density, without bias."""

from __future__ import annotations

import math

import pytest
import torch

from methods.draws import drawer
from methods.primitives import drop

N = 1 << 20
STEPS = 1 << 16
FINE = 1 / 64  # numbers below it have sixteen bits more


@pytest.fixture(scope="module")
def uniform() -> torch.Tensor:
    return drawer(3, "layer.weight", ("a",), (N,), 0, torch.device("cpu"))(0)


def test_numbers_are_multiples_of_their_step_and_fill_all_of_them(uniform):
    steps = (uniform * STEPS).floor()
    coarse = uniform >= FINE
    assert torch.equal(steps[coarse], uniform[coarse] * STEPS)
    rest = uniform[~coarse] * STEPS - steps[~coarse]
    assert abs(float(rest.mean()) - 0.5) < 5 / math.sqrt(12 * len(rest))
    assert len(rest.unique()) > 3_000
    counts = torch.bincount(steps.long(), minlength=STEPS).double()
    assert len(counts) == STEPS
    mean = N / STEPS
    chi = float(((counts - mean) ** 2 / mean).sum())
    assert abs(chi - (STEPS - 1)) < 5 * math.sqrt(2 * (STEPS - 1))


def test_neighbours_have_nothing_to_do_with_each_other(uniform):
    for lag in (1, 2, 3, 4, 16):
        correlation = float(torch.corrcoef(torch.stack([uniform[:-lag], uniform[lag:]]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(N)


@pytest.mark.parametrize("density", [0.0001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_a_drop_keeps_its_density_and_the_mean(uniform, density):
    kept = drop(torch.ones(N), uniform, density, rescale=True)
    share = float((kept != 0).double().mean())
    deviation = math.sqrt(density * (1 - density) / N)
    step = 0 if density < FINE else 1 / STEPS  # a probability is met to a step
    assert abs(share - density) < 5 * deviation + step
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1.0) / density)}
    assert float(kept.double().mean()) == pytest.approx(1, abs=(5 * deviation + step) / density)
    plain = drop(torch.ones(N), uniform, density, rescale=False)
    assert torch.equal(plain, (kept != 0).float())


@pytest.mark.parametrize("density", [1 / STEPS, 0.25, 1 - 1 / STEPS])
def test_exactly_the_numbers_below_the_density_are_kept(density):
    """At a multiple of a step nothing is left to rounding."""
    every = torch.arange(STEPS) / STEPS
    kept = drop(torch.full((STEPS,), 2.0), every, density, rescale=False)
    assert int((kept == 2).sum()) == round(density * STEPS)
    assert torch.equal(kept != 0, every < density)


def test_what_is_dropped_is_zero_whatever_it_was():
    every = torch.arange(STEPS) / STEPS
    deltas = torch.tensor([1e30, -1e-30, 0.0, -5.0]).repeat(STEPS // 4)
    kept = drop(deltas, every, 0.5, rescale=True)
    assert torch.equal(kept[: STEPS // 2], deltas[: STEPS // 2] / 0.5)
    assert not kept[STEPS // 2 :].any()
