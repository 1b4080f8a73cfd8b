import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.primitives import add_up, agreeing, average, drop, keep_above, spread

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
