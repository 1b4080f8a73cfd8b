"""Singular projection: a change split by the base weight's directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.inputs import MergeError
from harness.merge import merge_state_dicts
from methods.kinds import Place
from methods.matrices import RankError
from methods.singular_projection import SingularProjectionParams, singular_projection

BASE = torch.cat([torch.diag(torch.tensor([5.0, 3.0, 1.0])), torch.zeros(1, 3)])  # (4, 3)
CHANGE = torch.arange(1.0, 13).reshape(4, 3)


def change(**params: Any) -> torch.Tensor:
    chosen = SingularProjectionParams(**params)
    return singular_projection(BASE, (BASE + CHANGE)[None], chosen, place=Place(linear=True)) - BASE


def only(rows: slice, columns: slice) -> torch.Tensor:
    kept = torch.zeros(4, 3)
    kept[rows, columns] = CHANGE[rows, columns]
    return kept


@pytest.mark.parametrize(
    ("params", "rows", "columns"),
    [
        ({}, slice(1), slice(1)),  # 5 is more than half of 5 + 3 + 1
        ({"energy": 0.8}, slice(2), slice(2)),
        ({"rank": 2}, slice(2), slice(2)),
        ({"rank": 3}, slice(3), slice(3)),
        ({"part": "high", "rank": 1}, slice(1, 4), slice(1, 3)),
        ({"part": "high", "rank": 1, "null_space": False}, slice(1, 3), slice(1, 3)),
    ],
)
def test_by_hand(params: dict[str, Any], rows: slice, columns: slice) -> None:
    torch.testing.assert_close(change(**params), only(rows, columns), rtol=0, atol=1e-5)


def test_what_is_no_linear_layer_is_the_experts() -> None:
    expert = BASE + CHANGE
    merged = singular_projection(BASE, expert[None], SingularProjectionParams(), place=Place())
    assert torch.equal(merged, expert)
    assert merged.data_ptr() != expert.data_ptr()


def test_a_rank_above_the_matrix_is_refused() -> None:
    with pytest.raises(RankError, match=r"rank must be at most 3 for a matrix of shape \(4, 3\), got 4"):
        change(rank=4)
    state, expert = {"a": BASE}, {"bee": {"a": BASE + CHANGE}}
    params = {"rank": 4, "matrices": "all"}
    with pytest.raises(MergeError, match=r"a.*rank must be at most 3"):
        merge_state_dicts(state, expert, "singular_projection", params)
    merged = merge_state_dicts(state, expert, "singular_projection", {**params, "rank": 3})
    assert torch.allclose(merged["a"] - BASE, only(slice(3), slice(3)), atol=1e-5)


def test_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="part is one of low, high; got 'middle'"):
        SingularProjectionParams(part="middle")
    with pytest.raises(ValueError, match="rank must be at least 1 and finite, got 0"):
        SingularProjectionParams(rank=0)
