import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.magmax import MagmaxParams, magmax

VALUES = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 2.0])


def test_the_largest_change_of_each_weight() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    experts = base + torch.tensor([[1.0, -3.0, 0.0, -1.0], [-2.0, 2.0, 0.0, -0.5]])
    assert magmax(base, experts, MagmaxParams(scale=0.5)).tolist() == [0.0, -0.5, 1.0, 0.5]


@given(st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=1, max_size=4))
def test_one_of_the_changes_and_none_is_larger(rows: list[list[float]]) -> None:
    experts = torch.tensor(rows)
    chosen = magmax(torch.zeros(3), experts, MagmaxParams(scale=1.0))
    assert torch.equal(chosen.abs(), experts.abs().amax(0))
    assert (experts == chosen).any(0).all()
    assert torch.equal(chosen, magmax(torch.zeros(3), experts.flip(0), MagmaxParams(scale=1.0)))
