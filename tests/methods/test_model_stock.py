import pytest
import torch

from harness.merge import MergeError, merge_state_dicts


def merged(*rows: list, base: float = 1.0, **params) -> torch.Tensor:
    """Experts are the base plus a row each."""
    start = torch.full_like(torch.tensor(rows[0]), base)
    experts = {f"e{index}": {"w": start + torch.tensor(row)} for index, row in enumerate(rows)}
    return merge_state_dicts({"w": start}, experts, "model_stock", params)["w"] - start


def test_by_hand() -> None:
    """Sixty degrees between two: t = 2 * 0.5 / 1.5 of the way to their mean."""
    found = merged([2.0, 0.0], [1.0, 3**0.5])
    torch.testing.assert_close(found, 2 / 3 * torch.tensor([1.5, 3**0.5 / 2]))


@pytest.mark.parametrize(
    ("rows", "clamp", "expected"),
    [
        (([1.0, 0.0], [0.0, 1.0]), True, [0.0, 0.0]),  # at a right angle nothing is shared
        (([1.0, 2.0], [2.0, 4.0]), True, [1.5, 3.0]),  # the same way: the mean
        (([3.0, 0.0], [-1.0, 0.0]), True, [0.0, 0.0]),  # opposite: the base
        (([3.0, 0.0], [-1.0, 0.0]), False, [0.0, 0.0]),  # and no number for t without the bound
        (([2.0, 0.0], [-1.0, 3**0.5]), False, [-1.0, -(3**0.5)]),  # cosine -0.5: t = -2
    ],
)
def test_where_t_ends(rows: tuple, clamp: bool, expected: list[float]) -> None:
    torch.testing.assert_close(merged(*rows, clamp=clamp), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_each_filter_has_its_own_angle() -> None:
    """One filter changed alike, one at a right angle; kernels are filters too."""
    first, second = [[2.0, 0.0], [1.0, 0.0]], [[4.0, 0.0], [0.0, 1.0]]
    expected = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(merged(first, second, filter_wise=True), expected)
    kernels = [[[[2.0], [0.0]]], [[[1.0], [0.0]]]], [[[[4.0], [0.0]]], [[[0.0], [1.0]]]]
    torch.testing.assert_close(merged(*kernels, filter_wise=True).reshape(2, 2), expected)


def test_one_expert_is_refused() -> None:
    with pytest.raises(MergeError, match="at least 2 experts, got 1"):
        merged([1.0])
