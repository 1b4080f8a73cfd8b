import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.simplex import onto_simplex

numbers = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6)


@given(point=numbers, capped=st.booleans())
def test_it_is_the_nearest_point(point: list[float], capped: bool) -> None:
    """In the set, and the way there is at no more than a right angle to the way on to any corner."""
    start = torch.tensor(point)
    found = onto_simplex(start, capped)
    total = float(found.sum())
    assert float(found.min()) >= 0
    assert total <= 1 + 1e-5 if capped else total == pytest.approx(1, abs=1e-5)
    corners = [*torch.eye(len(point)), *([torch.zeros(len(point))] if capped else [])]
    assert all(float((start - found) @ (corner - found)) <= 1e-4 for corner in corners)


def test_rows_are_projected_each_for_itself() -> None:
    points = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for capped in (False, True):
        assert torch.equal(onto_simplex(points, capped), torch.stack([onto_simplex(row, capped) for row in points]))


def test_what_is_in_the_set_stays() -> None:
    inside = torch.tensor([0.25, 0.25, 0.5])
    assert torch.equal(onto_simplex(inside), inside)
    assert torch.equal(onto_simplex(inside / 2, capped=True), inside / 2)
