import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.primitives import (
    add_up,
    agreeing,
    average,
    drop,
    keep_above,
    keep_between,
    keep_in_rows,
    keep_n_of_m,
    l1_factors,
    norms,
    row_ranks,
    spread,
    summed,
    trim,
)

STACK = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])


def test_sums_and_means() -> None:
    assert add_up(STACK).tolist() == [5.0, 3.0, -3.0]
    assert add_up(STACK, [2.0, -1.0]).tolist() == [-2.0, -9.0, 12.0]
    assert add_up(STACK, torch.tensor([2.0, -1.0])).tolist() == [-2.0, -9.0, 12.0]
    assert average(STACK).tolist() == [2.5, 1.5, -1.5]


@given(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=3))
def test_one_number_for_each_expert(n_experts: int, shape: list[int]) -> None:
    stack = torch.ones(n_experts, *shape)
    scaled = spread(torch.arange(n_experts), stack) * stack
    assert scaled.shape == stack.shape
    for index in range(n_experts):
        assert (scaled[index] == index).all()


def test_what_is_as_large_as_the_threshold_is_kept() -> None:
    assert keep_above(STACK, torch.tensor([2.0, 5.5])).tolist() == [[0.0, -2.0, 3.0], [0.0, 0.0, -6.0]]


def test_a_number_below_the_density_keeps_an_entry() -> None:
    uniform = torch.tensor([0.0, 0.25, 0.24])
    assert drop(STACK[0], uniform, 0.25, rescale=True).tolist() == [4.0, 0.0, 12.0]
    assert drop(STACK[0], uniform, 0.25, rescale=False).tolist() == [1.0, 0.0, 3.0]


def test_entries_with_the_elected_sign() -> None:
    assert agreeing(STACK, "mean").tolist() == [2.5, 5.0, -6.0]
    assert agreeing(STACK, "sum").tolist() == [5.0, 5.0, -6.0]
    assert agreeing(STACK, "max").tolist() == [4.0, 5.0, -6.0]


def test_zeros_do_not_vote_nor_count() -> None:
    stack = torch.tensor([[2.0, 0.0], [0.0, 0.0], [4.0, 0.0]])
    assert agreeing(stack, "mean").tolist() == [3.0, 0.0]


def test_one_expert_one_vote() -> None:
    """A large change is outvoted by two small ones; equal votes merge nothing; a negative weight turns a vote."""
    stack = torch.tensor([[9.0, 1.0, 0.0], [-1.0, -1.0, 2.0], [-2.0, 0.0, 0.0]])
    assert agreeing(stack, "sum", by="count").tolist() == [-3.0, 0.0, 2.0]
    assert agreeing(stack, "sum", [1.0, 0.5, -1.0], by="count").tolist() == [11.0, 0.0, 1.0]
    assert agreeing(stack, "sum", [1.0, 0.0, 0.0], by="count").tolist() == [9.0, 1.0, 0.0]


def test_what_lies_between_is_kept() -> None:
    lows, highs = torch.tensor([2.0, 0.0]), torch.tensor([2.5, 5.0])
    assert keep_between(STACK, lows, highs).tolist() == [[0.0, -2.0, 0.0], [4.0, 5.0, 0.0]]


def test_a_share_of_each_row() -> None:
    matrix = torch.tensor([[1.0, -4.0, 2.0, 0.0], [8.0, 5.0, -6.0, 7.0]])
    assert keep_in_rows(matrix, 0.5).tolist() == [[0.0, -4.0, 2.0, 0.0], [8.0, 0.0, 0.0, 7.0]]
    assert keep_in_rows(matrix, 0.5, largest=False).tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 5.0, -6.0, 0.0]]
    assert keep_in_rows(torch.tensor(3.0), 0.1) == 3.0
    assert keep_in_rows(matrix[:, None, :, None], 0.5).flatten(1).tolist() == keep_in_rows(matrix, 0.5).tolist()


def test_ranks_in_rows() -> None:
    assert row_ranks(torch.tensor([[3.0, -1.0, 2.0], [0.0, -9.0, 4.0]])).tolist() == [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]
    assert row_ranks(torch.tensor([2.0, -1.0])).tolist() == [1.0, 0.0]
    assert row_ranks(torch.tensor([[2.0], [1.0]])).tolist() == [[0.5], [0.5]]


@given(st.integers(1, 4), st.integers(0, 4), st.lists(st.integers(0, 5), max_size=3))
def test_n_of_every_m(n: int, more: int, shape: list[int]) -> None:
    m = n + more
    delta = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    kept = keep_n_of_m(delta, n, m)
    assert kept.shape == delta.shape
    assert ((kept == 0) | (kept == delta)).all()
    for block in kept.flatten().split(m):
        assert int(block.count_nonzero()) == -(-n * len(block) // m)


def test_norms_are_given_back() -> None:
    kept = keep_above(STACK, torch.tensor([2.0, 7.0]))
    factors = l1_factors([(norms(STACK), norms(kept))])
    assert factors.tolist() == [pytest.approx(6 / 5), 1.0]
    assert trim(STACK, torch.stack([torch.tensor([2.0, 5.5]), torch.tensor([3.0, 2.0])])).tolist() == [
        [0.0, -6.0, 9.0],
        [0.0, 0.0, -12.0],
    ]
    assert trim(STACK, None) is STACK


def test_sums_in_float64_by_blocks() -> None:
    assert summed(torch.full((9000,), 0.1)) == pytest.approx(9000 * float(torch.tensor(0.1)), rel=1e-14)
    assert summed(torch.zeros(0)) == 0.0
