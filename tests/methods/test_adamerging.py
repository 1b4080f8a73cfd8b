import pytest
import torch

from harness.merge import MergeError, merge_state_dicts
from methods.adamerging import AdamergingParams, adamerging
from methods.catalogue import CATALOGUE

TARGET = torch.tensor([[0.1, 0.9], [0.5, -0.2], [0.3, 0.3]])  # (groups, T)


def quadratic(coefficients: torch.Tensor) -> tuple[float, torch.Tensor]:
    """A loss with its minimum at TARGET, and its gradient."""
    away = coefficients - TARGET
    return float(away.square().sum()), 2 * away


def searched(objective=quadratic, **params) -> tuple[torch.Tensor, list[tuple[int, float, torch.Tensor]]]:
    """The coefficients found, and what was reported."""
    reports = []

    def report(step: int, loss: float, coefficients: torch.Tensor) -> None:
        reports.append((step, loss, coefficients))

    return adamerging((3, 2), objective, AdamergingParams(**params), report), reports


def test_first_step_by_hand() -> None:
    """Adam's first step is the learning rate against the gradient's sign."""
    found, _ = searched(steps=1, lr=0.01, scale=0.3)
    expected = 0.3 - 0.01 * (0.3 - TARGET).sign()
    expected[2] = 0.3  # no gradient there
    torch.testing.assert_close(found, expected)


def test_coefficients_reach_the_minimum() -> None:
    found, reports = searched(steps=400, lr=0.02)
    torch.testing.assert_close(found, TARGET, atol=1e-2, rtol=0)
    assert quadratic(found)[0] < 1e-3 < reports[0][1]


def test_each_step_is_reported_with_the_coefficients_that_had_the_loss() -> None:
    _, reports = searched(steps=5, scale=0.4)
    assert [step for step, _, _ in reports] == [0, 1, 2, 3, 4]
    assert torch.equal(reports[0][2], torch.full((3, 2), 0.4))
    for _, loss, coefficients in reports:  # copies: later steps have not changed them
        assert loss == quadratic(coefficients)[0]
    losses = [loss for _, loss, _ in reports]
    assert losses == sorted(losses, reverse=True)


def test_clamped() -> None:
    free, _ = searched(steps=300, lr=0.02)
    held, _ = searched(steps=300, lr=0.02, clamp=True)
    assert float(free.min()) < 0
    assert float(held[1, 1]) == 0.0
    torch.testing.assert_close(held[0], free[0], atol=1e-2, rtol=0)


def test_a_loss_that_is_no_number_ends_the_search_with_its_step() -> None:
    calls = iter([1.0, 0.5, float("nan")])

    def objective(coefficients: torch.Tensor) -> tuple[float, torch.Tensor]:
        return next(calls), torch.ones_like(coefficients)

    with pytest.raises(FloatingPointError, match=r"not a number at step 2; a smaller lr than 0.001"):
        searched(objective, steps=10)


def test_the_row_names_the_rule_whose_coefficients_it_finds() -> None:
    """The rule takes them: task arithmetic with scale one and the coefficients as weights."""
    row = CATALOGUE["adamerging"]
    base, experts = {"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}, "b": {"w": torch.tensor([1.0, 3.0])}}
    merged = merge_state_dicts(base, experts, row.rule, {"scale": 1.0, "weights": TARGET[0].tolist()})
    torch.testing.assert_close(merged["w"], torch.tensor([1.0, 2.8]))


def test_it_is_no_method_for_state_dicts() -> None:
    with pytest.raises(MergeError, match=r"adamerging needs models and data.*crucible run method=adamerging"):
        merge_state_dicts({"w": torch.ones(1)}, {"a": {"w": torch.ones(1)}}, "adamerging")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"granularity": "block"}, "granularity is one of task, layer, tensor; got 'block'"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("inf")}, "lr must be a finite number"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"scale": float("nan")}, "scale must be a finite number"),
    ],
)
def test_params_are_checked(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamergingParams(**params)
