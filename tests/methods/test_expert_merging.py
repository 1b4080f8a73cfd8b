from typing import Any

import pytest
import torch

from methods.expert_merging import ExpertMergingParams, expert_merging
from tests.methods.searching import INSIDE, quadratic, searched


def test_the_first_step_by_hand() -> None:
    """Adam's first step is the learning rate against the slope's sign; nothing holds a coefficient at the start."""

    def objective(coefficients: torch.Tensor) -> tuple[float, torch.Tensor]:
        return float(10 - coefficients.sum()), torch.tensor([[3.0, -1.0, 0.0]])

    _, reports = searched(expert_merging, (1, 3), objective, ExpertMergingParams(steps=1, lr=0.01, scale=0.2))
    assert reports[0][2].tolist() == [[0.2, 0.2, 0.2]] or torch.allclose(reports[0][2], torch.full((1, 3), 0.2))
    torch.testing.assert_close(reports[1][2], torch.tensor([[0.19, 0.21, 0.2]]))
    assert reports[1][1] == pytest.approx(9.4 + 0.8 * 0.02 / 3)  # the way from the start is counted


def test_it_starts_at_the_average() -> None:
    _, reports = searched(expert_merging, (2, 4), quadratic(torch.zeros(2, 4)), ExpertMergingParams(steps=1))
    assert (reports[0][2] == 0.25).all()


def test_the_coefficients_reach_the_minimum() -> None:
    found, reports = searched(
        expert_merging, (2, 3), quadratic(INSIDE), ExpertMergingParams(steps=400, lr=0.02, gamma=0.0)
    )
    torch.testing.assert_close(found, INSIDE, atol=1e-2, rtol=0)
    assert quadratic(INSIDE)(found)[0] < reports[0][1]
    assert len(reports) == 401


def test_the_way_from_the_start_is_held_short() -> None:
    """Each coefficient goes as far as the slope outweighs gamma / 6; none where it nowhere does."""
    found, _ = searched(expert_merging, (2, 3), quadratic(INSIDE), ExpertMergingParams(steps=400, lr=0.02, gamma=1.2))
    away = INSIDE - 1 / 3
    expected = 1 / 3 + away.sign() * (away.abs() - 0.1).clamp(min=0)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    still, _ = searched(expert_merging, (2, 3), quadratic(INSIDE), ExpertMergingParams(steps=20, lr=0.02, gamma=10.0))
    torch.testing.assert_close(still, torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.8])
def test_what_is_kept_has_the_least_loss_of_all(gamma: float) -> None:
    params = ExpertMergingParams(steps=15, lr=0.1, gamma=gamma)
    found, reports = searched(expert_merging, (2, 3), quadratic(INSIDE), params)
    value = quadratic(INSIDE)(found)[0] + gamma * float((found - 1 / 3).abs().mean())
    assert value == pytest.approx(min(loss for _, loss, _ in reports))
    assert value < reports[0][1]


def test_copies_of_one_expert_give_that_expert() -> None:
    """Its answers are met from the start on; noise in the slopes, which Adam follows, does not move what is kept."""
    generator = torch.Generator().manual_seed(0)

    def objective(coefficients: torch.Tensor) -> tuple[float, torch.Tensor]:
        away = coefficients.sum(1, keepdim=True) - 1
        noise = 1e-7 * torch.randn(coefficients.shape, generator=generator)
        return float(away.square().sum()), 2 * away + noise

    found, _ = searched(expert_merging, (2, 3), objective, ExpertMergingParams(steps=20))
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_a_loss_that_is_no_number_ends_the_search() -> None:
    def objective(coefficients: torch.Tensor, **how: Any) -> tuple[float, torch.Tensor]:
        return float("nan"), torch.zeros_like(coefficients)

    with pytest.raises(FloatingPointError, match=r"nan at step 0, where the coefficients are .*, \.\.\.; a smaller lr"):
        searched(expert_merging, (4, 3), objective, ExpertMergingParams())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"granularity": "block"}, "granularity is one of tensor, task, layer"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"hidden": -1.0}, "hidden must be at least 0"),
        ({"gamma": -1.0}, "gamma must be at least 0"),
        ({"weights": []}, "weights must not be an empty list"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"scale": float("nan")}, "scale must be a finite number"),
    ],
)
def test_params_are_checked(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertMergingParams(**params)
