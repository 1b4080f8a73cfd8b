import math

import pytest
import torch

from harness.merge import MergeError, merge_state_dicts

HALF = math.sqrt(0.5)


def between(first: list, second: list, base: list | None = None, **params) -> torch.Tensor:
    start = None if base is None else {"w": torch.tensor(base)}
    models = {"a": {"w": torch.tensor(first)}, "b": {"w": torch.tensor(second)}}
    return merge_state_dicts(start, models, "nuslerp", params)["w"]


def test_by_hand() -> None:
    """A right angle, a third of the way; from a base it is that of the task vectors."""
    expected = torch.tensor([math.sqrt(3) / 2, 0.5])
    torch.testing.assert_close(between([1.0, 0.0], [0.0, 1.0], weights=[2.0, 1.0]), expected)
    torch.testing.assert_close(between([6.0, 5.0], [5.0, 6.0], [5.0, 5.0], weights=[2.0, 1.0]), expected + 5)


def test_every_row_or_column_has_its_angle() -> None:
    """The first row goes the same way, the second is at a right angle; columns are rows of the transpose."""
    first, second = [[2.0, 0.0], [1.0, 0.0]], [[4.0, 0.0], [0.0, 1.0]]
    expected = torch.tensor([[3.0, 0.0], [HALF, HALF]])
    torch.testing.assert_close(between(first, second, along="last"), expected)
    turned = between([[2.0, 1.0], [0.0, 0.0]], [[4.0, 0.0], [0.0, 1.0]], along="first")
    torch.testing.assert_close(turned, expected.T.contiguous())


def test_the_same_or_opposite_direction_is_met_straight() -> None:
    torch.testing.assert_close(between([1.0, 2.0], [2.0, 4.0]), torch.tensor([1.5, 3.0]))
    torch.testing.assert_close(between([1.0, 2.0], [-2.0, -4.0]), torch.tensor([-0.5, -1.0]))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="weights must not sum to zero"):
        between([1.0], [2.0], weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="along is one of tensor, last, first"):
        between([1.0], [2.0], along="rows")
    with pytest.raises(MergeError, match="weights lists 3 numbers for 2"):
        between([1.0], [2.0], weights=[1.0, 1.0, 1.0])
