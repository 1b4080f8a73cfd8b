import itertools

import pytest
import torch

from methods.min_norm import min_norm


def gradients(n_tasks: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(n_tasks, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_by_hand() -> None:
    """Of (2, 0) and (0, 1) the point of the segment next to the origin is a fifth of the first."""
    assert min_norm([[4.0, 0.0], [0.0, 1.0]]) == pytest.approx([0.2, 0.8])
    assert min_norm([[1.0, 1.5], [1.5, 4.0]]) == [1.0, 0.0]  # the second is longer and points the same way
    assert min_norm([[4.0, 1.5], [1.5, 1.0]], margin=0.001) == [0.001, 0.999]


def test_one_task_and_none_that_pulls() -> None:
    assert min_norm([[3.0]]) == [1.0]
    assert sum(min_norm(torch.zeros(3, 3))) == pytest.approx(1)
    assert min_norm([[0.0, 0.0], [0.0, 5.0]]) == [1.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n_tasks", "size"), [(3, 2), (4, 6), (6, 3)])
def test_no_task_could_be_served_better(n_tasks: int, size: int, seed: int) -> None:
    """At the least norm, each gradient has at least that much in its direction; all that have weight exactly it."""
    vectors = gradients(n_tasks, size, seed) + 0.5
    weights = torch.tensor(min_norm(vectors @ vectors.T), dtype=torch.float64)
    assert float(weights.min()) >= 0
    assert float(weights.sum()) == pytest.approx(1)
    combined = weights @ vectors
    along = vectors @ combined - combined @ combined
    assert float(along.min()) > -1e-8
    assert float(along[weights > 1e-6].abs().max()) < 1e-5


def test_three_against_a_grid() -> None:
    vectors = gradients(3, 4, 1) + 0.3
    table = vectors @ vectors.T
    grid = [(a / 50, b / 50, (50 - a - b) / 50) for a, b in itertools.product(range(51), repeat=2) if a + b <= 50]
    norms = [float(torch.tensor(w, dtype=torch.float64) @ table @ torch.tensor(w, dtype=torch.float64)) for w in grid]
    weights = torch.tensor(min_norm(table), dtype=torch.float64)
    assert float(weights @ table @ weights) <= min(norms) + 1e-12
