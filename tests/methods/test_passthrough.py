import pytest
import torch

from harness.merge import MergeError, merge_state_dicts

ONE = {"a": {"w": torch.tensor([1.0, -2.0])}}


def test_by_hand() -> None:
    assert merge_state_dicts(None, ONE, "passthrough")["w"].tolist() == [1.0, -2.0]
    assert merge_state_dicts(None, ONE, "passthrough", {"scale": 0.5})["w"].tolist() == [0.5, -1.0]


def test_the_bits_are_the_experts() -> None:
    expert = {"a": {"w": torch.randn(9).bfloat16()}}
    assert torch.equal(merge_state_dicts(None, expert, "passthrough")["w"], expert["a"]["w"])


def test_two_experts_are_refused() -> None:
    with pytest.raises(MergeError, match="passthrough merges 1 experts, got 2: a, b"):
        merge_state_dicts(None, {**ONE, "b": ONE["a"]}, "passthrough")


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_is_a_number(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be a finite number"):
        merge_state_dicts(None, ONE, "passthrough", {"scale": scale})
