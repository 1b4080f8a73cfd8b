from typing import Any

import pytest
import torch

from harness.merge import MergeError, merge_state_dicts
from methods.catalogue import CATALOGUE
from methods.continual import ContinualTiesParams
from methods.kinds import Kind

State = dict[str, torch.Tensor]
FOLDS = [row.name for row in CATALOGUE.values() if row.kind is Kind.fold]


def models(n_experts: int, seed: int = 0) -> tuple[State, dict[str, State]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"fc.weight": (6, 5), "fc.bias": (6,), "scale": ()}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {
        f"e{index}": {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        for index in range(n_experts)
    }
    return base, experts


def assert_close(merged: State, expected: State) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor)


@pytest.mark.parametrize("n_experts", [2, 5])
def test_average_and_task_arithmetic_are_those_of_all_at_once(n_experts: int) -> None:
    base, experts = models(n_experts)
    assert_close(
        merge_state_dicts(None, experts, "continual_average"), merge_state_dicts(None, experts, "simple_average")
    )
    params = {"scale": 0.4}
    assert_close(
        merge_state_dicts(base, experts, "continual_task_arithmetic", params),
        merge_state_dicts(base, experts, "task_arithmetic", params),
    )


@pytest.mark.parametrize("disjoint", ["mean", "sum"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_of_two_is_ties(disjoint: str, density: float) -> None:
    base, experts = models(2)
    params = {"disjoint": disjoint, "density": density, "scale": 0.7}
    assert_close(
        merge_state_dicts(base, experts, "continual_ties", params), merge_state_dicts(base, experts, "ties", params)
    )


def ties_of(changes: list[list[float]], **params) -> list[float]:
    """Changes of one bias, expert after expert."""
    base = {"bias": torch.zeros(len(changes[0]))}
    experts = {f"e{index}": {"bias": torch.tensor(change)} for index, change in enumerate(changes)}
    return merge_state_dicts(base, experts, "continual_ties", {"density": 1.0, **params})["bias"].tolist()


def test_ties_by_hand() -> None:
    """First entry: all agree. Second: the third expert outweighs the two before and stands alone. Third: it does not,
    and they stay. Fourth: a single vote."""
    changes = [[1.0, 1.0, 4.0, 0.0], [2.0, 1.0, 2.0, 0.0], [6.0, -3.0, -5.0, 7.0]]
    assert ties_of(changes) == pytest.approx([3.0, -3.0, 3.0, 7.0])
    assert ties_of(changes, disjoint="sum", scale=0.5) == pytest.approx([4.5, -1.5, 3.0, 3.5])


def test_ties_does_not_drift_with_copies() -> None:
    """The same expert again and again: the mean stays where it is, which adding onto the merged model would not."""
    assert ties_of([[1.0, -2.0]] * 6) == pytest.approx([1.0, -2.0])


def test_ties_trims_the_newcomer_alone() -> None:
    """Half of each is kept; what the first has kept stays though the second's is larger."""
    assert ties_of([[1.0, 0.1], [0.2, 9.0]], density=0.5) == pytest.approx([1.0, 9.0])


@pytest.mark.parametrize("method", FOLDS)
def test_a_fold_over_one_expert_is_refused(method: str) -> None:
    base, experts = models(1)
    with pytest.raises(MergeError, match=f"{method} merges at least 2 experts, got 1: e0"):
        merge_state_dicts(base, experts, method)


@pytest.mark.parametrize(("name", "value"), [("density", 20.0), ("disjoint", "max"), ("scale", float("nan"))])
def test_bad_parameters(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        ContinualTiesParams(**{name: value})
