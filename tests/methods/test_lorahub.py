from collections.abc import Sequence
from typing import Any

import pytest
import torch

from harness.sampler import cma_es
from methods.lorahub import LorahubParams, lorahub
from tests.methods.searching import quadratic, searched

TARGET = torch.tensor([[0.8, -0.3, 0.4]])


class Listed:
    """Asked for points in the order of a list; a generation is two."""

    population = 2

    def __init__(self, points: list[list[float]]) -> None:
        self.points, self.told = iter(points), []

    def ask(self) -> torch.Tensor:
        return torch.tensor(next(self.points))

    def tell(self, points: Sequence[torch.Tensor], losses: Sequence[float]) -> None:
        self.told.append(([point.tolist() for point in points], list(losses)))


def test_by_hand() -> None:
    """The start, then what is asked for, each with l1 times the mean magnitude; the least is kept."""
    listed = Listed([[1.0, 0.0], [0.5, 0.5], [0.0, -1.0]])

    def objective(coefficients: torch.Tensor, slope: bool) -> tuple[float, torch.Tensor]:
        assert not slope
        return 2.0 - float(coefficients[0, 0]), torch.empty(0)

    found, reports = searched(
        lorahub, (1, 2), objective, LorahubParams(steps=4, l1=0.5), sampler=lambda start, spread, bound: listed
    )
    assert [loss for _, loss, _ in reports] == [2.0, 1.25, 1.75, 2.25]
    assert found.tolist() == [[1.0, 0.0]]
    assert listed.told == [([[1.0, 0.0], [0.5, 0.5]], [1.25, 1.75])]  # a generation that is not full is not told


def test_the_search_starts_where_it_is_told() -> None:
    made = []

    def sampler(*given: Any) -> Listed:
        made.append(given)
        return Listed([])

    searched(
        lorahub, (2, 2), quadratic(torch.zeros(2, 2)), LorahubParams(steps=1, scale=0.25, spread=0.4, bound=1.0),
        sampler=sampler,
    )  # fmt: skip
    assert made == [([0.25] * 4, 0.4, 1.0)]


def test_the_minimum_is_found_without_a_gradient() -> None:
    found, reports = searched(
        lorahub, (1, 3), quadratic(TARGET), LorahubParams(steps=300, l1=0.0), sampler=cma_es(seed=0)
    )
    torch.testing.assert_close(found, TARGET, atol=0.02, rtol=0)
    assert len(reports) == 300


@pytest.mark.parametrize("granularity", ["task", "layer"])
@pytest.mark.parametrize("seed", range(3))
def test_the_default_budget_lowers_the_loss(granularity: str, seed: int) -> None:
    shape = (1 if granularity == "task" else 2, 3)
    target = TARGET.expand(shape)
    params = LorahubParams(granularity=granularity)
    found, reports = searched(lorahub, shape, quadratic(target), params, sampler=cma_es(seed))
    value = quadratic(target)(found)[0] + params.l1 * float(found.abs().mean())
    assert value == pytest.approx(min(loss for _, loss, _ in reports))
    assert value < 0.8 * reports[0][1]
    assert len(reports) == 40
    assert float(found.abs().max()) <= 1.5


def test_equal_seeds_equal_results() -> None:
    one, same, other = (
        searched(lorahub, (1, 3), quadratic(TARGET), LorahubParams(), sampler=cma_es(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_copies_of_one_expert_lead_to_that_expert() -> None:
    """The loss knows the sum alone and is least at one; without l1 the search comes there."""

    def objective(coefficients: torch.Tensor, slope: bool) -> tuple[float, torch.Tensor]:
        return float((coefficients.sum() - 1).square()), torch.empty(0)

    found, _ = searched(lorahub, (1, 3), objective, LorahubParams(steps=200, l1=0.0), sampler=cma_es(0))
    assert float(found.sum()) == pytest.approx(1, abs=1e-3)


def test_a_loss_that_is_no_number_ends_the_search() -> None:
    def objective(coefficients: torch.Tensor, slope: bool) -> tuple[float, torch.Tensor]:
        return float("nan"), torch.empty(0)

    with pytest.raises(FloatingPointError, match="loss is nan at step 0, where the coefficients are 0, 0, 0; a"):
        searched(lorahub, (1, 3), objective, LorahubParams(), sampler=cma_es(0))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"granularity": "tensor"}, "granularity is one of task, layer"),
        ({"scale": 1.0, "bound": 0.5}, r"scale lies in \[-bound, bound\] = \[-0.5, 0.5\], got 1.0"),
        ({"bound": 0.0}, "bound must be positive"),
        ({"spread": 0.0}, "spread must be positive"),
        ({"l1": -0.1}, "l1 must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_params_are_checked(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LorahubParams(**params)
