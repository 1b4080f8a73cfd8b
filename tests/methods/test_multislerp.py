import math

import pytest
import torch

from harness.merge import MergeError, merge_state_dicts


def merged(*rows: list, base: list | None = None, **params) -> torch.Tensor:
    start = None if base is None else {"w": torch.tensor(base)}
    experts = {f"e{index}": {"w": torch.tensor(row)} for index, row in enumerate(rows)}
    return merge_state_dicts(start, experts, "multislerp", params)["w"]


def test_by_hand() -> None:
    """Two at a right angle, one and three long: half way between, two long; from a base the same of the changes."""
    expected = torch.tensor([2.0, 2.0]) * math.sqrt(0.5)
    torch.testing.assert_close(merged([1.0, 0.0], [0.0, 3.0]), expected)
    torch.testing.assert_close(merged([6.0, 5.0], [5.0, 8.0], base=[5.0, 5.0]), expected + 5)


def test_weights_turn_it_and_may_lengthen_it() -> None:
    found = merged([1.0, 0.0], [0.0, 1.0], weights=[3.0, 4.0])
    torch.testing.assert_close(found, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(merged([1.0, 0.0], [0.0, 1.0], weights=[3.0, 4.0], normalize=False), 7 * found)


def test_directions_that_cancel_out_are_averaged() -> None:
    torch.testing.assert_close(merged([1.0, 0.0], [-3.0, 0.0]), torch.tensor([-1.0, 0.0]))


def test_weights_that_sum_to_zero_or_lack_one_are_refused() -> None:
    with pytest.raises(ValueError, match="must not sum to zero"):
        merged([1.0], [2.0], weights=[1.0, -1.0])
    with pytest.raises(MergeError, match="weights lists 1 numbers for 2"):
        merged([1.0], [2.0], weights=[1.0])
