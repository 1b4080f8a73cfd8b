import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.selection import count_kept, kth_largest


def threshold(values: torch.Tensor, density: float, n_pieces: int = 1) -> list[float]:
    """Of (T, n) values, walked in pieces."""
    pieces = [piece for piece in values.tensor_split(n_pieces, dim=1) if piece.numel()]
    return kth_largest(lambda function, limit=None: [function(piece[:, :limit]) for piece in pieces], density).tolist()


def test_by_hand() -> None:
    values = torch.tensor([[1.0, -6.0, 3.0, -2.0, 5.0, 4.0], [0.0, 0.0, 0.0, 0.0, 0.5, -0.25]])
    assert threshold(values, 0.5) == [4.0, 0.0]
    assert threshold(values, 1 / 3) == [5.0, 0.25]
    assert threshold(values, 0.01) == [6.0, 0.5]
    assert threshold(values, 1.0) == [1.0, 0.0]


floats = st.floats(allow_nan=False, allow_infinity=False, width=32)  # subnormals included


@given(
    rows=st.integers(1, 3).flatmap(
        lambda n: st.lists(st.lists(floats, min_size=n * 4, max_size=n * 4), min_size=1, max_size=3)
    ),
    density=st.floats(0.01, 1.0),
    n_pieces=st.integers(1, 4),
)
def test_it_is_the_sorted_one(rows: list[list[float]], density: float, n_pieces: int) -> None:
    values = torch.tensor(rows)
    kept = count_kept(density, values.shape[1])
    expected = values.abs().sort(dim=1, descending=True).values[:, kept - 1]
    assert threshold(values, density, n_pieces) == expected.tolist()


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999])
def test_exactly_the_share_is_kept(density: float) -> None:
    values = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    values = torch.stack([row[np.unique(row.abs().numpy(), return_index=True)[1]][:49_000] for row in values])
    kept = (values.abs() >= torch.tensor(threshold(values, density, 7))[:, None]).sum(1)
    assert kept.tolist() == [count_kept(density, 49_000)] * 2


def test_neighbouring_floats_are_told_apart() -> None:
    """They share the upper half of their bits."""
    first = np.float32(1.0)
    values = [first]
    for _ in range(9):
        values.append(np.nextafter(values[-1], np.float32(2)))
    assert threshold(torch.tensor(np.array([values])), 0.3) == [float(values[7])]


@pytest.mark.parametrize(
    ("density", "n", "kept"), [(0.29, 100, 29), (0.7, 10, 7), (0.3, 10, 3), (1.0, 7, 7), (0.1, 1, 1)]
)
def test_count_kept(density: float, n: int, kept: int) -> None:
    assert count_kept(density, n) == kept


@given(n=st.integers(1, 10**9), k=st.integers(1, 10**9))
def test_count_kept_of_a_fraction(n: int, k: int) -> None:
    """k out of n are k, whatever the division's rounding."""
    k = min(k, n)
    assert count_kept(k / n, n) == k
