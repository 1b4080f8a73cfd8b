import pytest
import torch

from harness.merge import merge_state_dicts

BASE = {"w": torch.tensor([1.0, 1.0, 1.0])}
EXPERTS = {"a": {"w": torch.tensor([2.0, 1.0, 0.0])}, "b": {"w": torch.tensor([3.0, 5.0, 1.0])}}


def merged(**params) -> list[float]:
    return merge_state_dicts(BASE, EXPERTS, "task_arithmetic", params)["w"].tolist()


def test_by_hand() -> None:
    """Task vectors (1, 0, -1) and (2, 4, 0), summed (3, 4, -1)."""
    assert merged(scale=0.5) == [2.5, 3.0, 0.5]
    assert merged(scale=1.0) == [4.0, 5.0, 0.0]


def test_a_coefficient_for_each_task_vector() -> None:
    assert merged(scale=0.5, weights=[2.0, 1.0]) == [3.0, 3.0, 0.0]


def test_one_over_the_number_of_experts_is_the_simple_average() -> None:
    average = merge_state_dicts(BASE, EXPERTS, "simple_average")["w"]
    torch.testing.assert_close(torch.tensor(merged(scale=0.5)), average)


def test_negation_forgets() -> None:
    one = {"a": EXPERTS["a"]}
    assert merge_state_dicts(BASE, one, "task_arithmetic", {"scale": -1.0})["w"].tolist() == [0.0, 1.0, 2.0]


def test_as_many_weights_as_experts() -> None:
    with pytest.raises(ValueError, match="weights lists 3 numbers for 2 experts"):
        merged(weights=[1.0, 2.0, 3.0])
