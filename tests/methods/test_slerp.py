import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.merge import MergeError, merge_state_dicts


def between(first: torch.Tensor, second: torch.Tensor, **params) -> torch.Tensor:
    return merge_state_dicts(None, {"a": {"w": first}, "b": {"w": second}}, "slerp", params)["w"]


def test_by_hand() -> None:
    """A right angle: a third of the way are 30 degrees."""
    merged = between(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), t=1 / 3)
    torch.testing.assert_close(merged, torch.tensor([math.sqrt(3) / 2, 0.5]))


def test_un_normalised_tensors_are_combined() -> None:
    merged = between(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0]), t=0.5)
    torch.testing.assert_close(merged, torch.tensor([2.0, 4.0]) * math.sqrt(0.5))


@given(t=st.floats(0, 1), seed=st.integers(0, 1000))
def test_norm_and_angle(t: float, seed: int) -> None:
    """Between unit tensors the norm is one and the angle from the first grows with t."""
    first, second = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first, second = first / first.norm(), second / second.norm()
    angle = math.acos(float((first * second).sum()))
    merged = between(first.float(), second.float(), t=t).double()
    assert float(merged.norm()) == pytest.approx(1, abs=1e-5)
    assert float((merged * first).sum()) == pytest.approx(math.cos(t * angle), abs=1e-5)


@pytest.mark.parametrize(("t", "expected"), [(0.0, "a"), (1.0, "b")])
def test_the_ends_are_the_models(t: float, expected: str) -> None:
    models = {"a": torch.randn(4, 5), "b": torch.randn(4, 5)}
    torch.testing.assert_close(between(*models.values(), t=t), models[expected])


def test_swapped_models_with_the_rest_of_the_way() -> None:
    first, second = torch.randn(2, 7)
    torch.testing.assert_close(between(first, second, t=0.3), between(second, first, t=0.7))


def test_from_the_base_to_one_expert() -> None:
    first, second = torch.randn(2, 7)
    merged = merge_state_dicts({"w": first}, {"b": {"w": second}}, "slerp", {"t": 0.3})["w"]
    assert torch.equal(merged, between(first, second, t=0.3))


@pytest.mark.parametrize(
    ("first", "second"),
    [([1.0, 2.0], [2.0, 4.0]), ([1.0, 2.0], [-2.0, -4.0]), ([0.0, 0.0], [2.0, 4.0]), ([0.0, 0.0], [0.0, 0.0])],
    ids=["same direction", "opposite", "one zero", "both zero"],
)
def test_where_there_is_no_angle_the_way_is_straight(first: list[float], second: list[float]) -> None:
    start, end = torch.tensor(first), torch.tensor(second)
    torch.testing.assert_close(between(start, end, t=0.25), 0.75 * start + 0.25 * end)


def test_straight_above_a_cosine() -> None:
    start, end = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.5])  # cosine 0.894
    torch.testing.assert_close(between(start, end, linear_above=0.8), (start + end) / 2)
    assert float(between(start, end, linear_above=0.9).norm()) > float(((start + end) / 2).norm())


@pytest.mark.parametrize(
    ("params", "shares"), [({"t": 0.3}, (0.3, 0.3)), ({"weights": [1.0, 2.0, 5.0]}, (2 / 3, 5 / 8))]
)
def test_more_are_folded_in_their_order(params: dict, shares: tuple[float, float]) -> None:
    """The same as merges of two, one after the other; weights tell how far each step goes."""
    a, b, c = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    merged = merge_state_dicts(None, {"a": {"w": a}, "b": {"w": b}, "c": {"w": c}}, "slerp", params)["w"]
    torch.testing.assert_close(merged, between(between(a, b, t=shares[0]), c, t=shares[1]))


def test_weights_are_above_zero_and_one_for_each() -> None:
    models = {"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}}
    with pytest.raises(ValueError, match="weights must be positive and finite, got 0"):
        merge_state_dicts(None, models, "slerp", {"weights": [1.0, 0.0]})
    with pytest.raises(MergeError, match="weights lists 3 numbers for 2"):
        merge_state_dicts(None, models, "slerp", {"weights": [1.0, 1.0, 1.0]})


def test_one_expert_without_a_base_is_refused() -> None:
    with pytest.raises(MergeError, match="give two experts, or a base and one expert"):
        merge_state_dicts(None, {"a": {"w": torch.ones(2)}}, "slerp")
