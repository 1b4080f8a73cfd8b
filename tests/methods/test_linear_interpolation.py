import pytest
import torch

from harness.merge import MergeError, merge_state_dicts

ONE, TWO = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}


def test_by_hand() -> None:
    assert merge_state_dicts(None, {"a": ONE, "b": TWO}, "linear_interpolation", {"t": 0.25})["w"].tolist() == [
        1.5,
        1.0,
    ]


def test_from_the_base_to_the_one_expert() -> None:
    assert merge_state_dicts(ONE, {"b": TWO}, "linear_interpolation")["w"].tolist() == [2.0, 0.0]


def test_one_model_is_refused() -> None:
    with pytest.raises(MergeError, match="give two experts, or a base and one expert"):
        merge_state_dicts(None, {"a": ONE}, "linear_interpolation")
    with pytest.raises(MergeError, match="merges 1 to 2 experts, got 3"):
        merge_state_dicts(None, {"a": ONE, "b": TWO, "c": ONE}, "linear_interpolation")


def test_t_is_a_number() -> None:
    with pytest.raises(ValueError, match="t must be a finite number"):
        merge_state_dicts(None, {"a": ONE, "b": TWO}, "linear_interpolation", {"t": float("nan")})
