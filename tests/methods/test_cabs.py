import pytest
import torch

from methods.cabs import CabsParams, cabs


def merged(deltas: list[list[float]], **params) -> list[float]:
    rows = torch.tensor(deltas)
    return cabs(torch.zeros_like(rows[0]), rows, CabsParams(**params)).tolist()


def test_the_largest_of_each_block_and_none_twice() -> None:
    first = [4.0, 1.0, -3.0, 0.5, 1.0, 0.1]
    second = [9.0, -2.0, 8.0, 7.0, 6.0, 0.2]
    assert merged([first], n=1, m=2) == [4.0, 0, -3.0, 0, 1.0, 0]
    assert merged([first, second], n=1, m=2) == [4.0, -2.0, -3.0, 7.0, 1.0, pytest.approx(0.2)]
    assert merged([second, first], n=1, m=2)[:2] == [9.0, 1.0]
    assert merged([first, second], n=1, m=2, weights=[1.0, 10.0], scale=2.0)[:2] == [8.0, -40.0]


def test_a_remainder_keeps_its_share_rounded_up() -> None:
    assert merged([[1.0, 2.0, 3.0, 4.0, 5.0]], n=2, m=4) == [0, 0, 3.0, 4.0, 5.0]
    assert merged([[1.0, 2.0, 3.0]], n=1, m=4) == [0, 0, 3.0]
    assert merged([[1.0], [2.0]], n=1, m=4) == [1.0]


def test_blocks_run_over_rows() -> None:
    deltas = torch.tensor([[[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]]])
    found = cabs(torch.zeros(2, 3), deltas, CabsParams(n=1, m=2))
    assert found.tolist() == [[0, 2.0, 0], [6.0, 5.0, 0]]


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (1, 0)])
def test_n_of_m_is_checked(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=r"n in \[1, m\], got n"):
        CabsParams(n=n, m=m)
