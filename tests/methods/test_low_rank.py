"""Low-rank arithmetic against the full decomposition of the full matrix."""

from __future__ import annotations

import pytest
import torch

from methods.low_rank import LowRank, approximate, concatenate, squared_norm, truncate


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts(
    m: int, n: int, ranks: tuple[int, ...], weights: tuple[float, ...]
) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    return [
        (random(m, r, seed=2 * i), random(r, n, seed=2 * i + 1), weight)
        for i, (r, weight) in enumerate(zip(ranks, weights, strict=True))
    ]


def summed(terms: list[tuple[torch.Tensor, torch.Tensor, float]]) -> torch.Tensor:
    return sum((weight * (left.double() @ right.double()) for left, right, weight in terms), torch.zeros(()))


def best(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """The nearest matrix of a rank, and the relative error, from the full decomposition."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] * values[:rank] @ v[:rank], float(values[rank:].norm() / values.norm())


def product(found: LowRank) -> torch.Tensor:
    return found.left.double() @ found.right.double()


def test_concatenation_is_the_exact_sum_with_negative_weights():
    terms = parts(9, 7, (2, 3, 1), (0.5, -2.0, 0.0))
    left, right = concatenate(terms)
    assert (left.shape, right.shape) == ((9, 6), (6, 7))
    torch.testing.assert_close(left.double() @ right.double(), summed(terms), rtol=1e-6, atol=1e-6)
    assert squared_norm(left, right) == pytest.approx(float(summed(terms).square().sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("m", "n", "ranks"), [(40, 30, (4, 3)), (30, 40, (5, 5)), (12, 50, (8, 8)), (50, 6, (4, 5)), (5, 5, (9,))]
)
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_truncation_of_factors_is_the_best_approximation(m, n, ranks, rank):
    terms = parts(m, n, ranks, (0.7, -0.4)[: len(ranks)])
    expected, error = best(summed(terms), rank)
    found = truncate(*concatenate(terms), rank=rank)
    torch.testing.assert_close(product(found), expected, rtol=1e-5, atol=1e-5)
    assert found.error == pytest.approx(error, abs=1e-6)
    assert found.square == pytest.approx(float(summed(terms).square().sum()), rel=1e-5)
    assert found.left.shape[1] == found.right.shape[0] <= rank


@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40), (1, 5), (5, 1), (9000, 3)])
@pytest.mark.parametrize("rank", [1, 7, 100])
def test_approximation_of_a_matrix_is_the_best(m, n, rank):
    delta = random(m, n) * torch.linspace(1, 0.01, n)
    expected, error = best(delta, rank)
    found = approximate(delta, rank=rank)
    torch.testing.assert_close(product(found), expected, rtol=1e-4, atol=1e-5)
    assert found.error == pytest.approx(error, abs=1e-6)
    assert found.left.shape == (m, min(rank, m, n))


def test_both_ways_agree_and_the_factors_share_the_length():
    terms = parts(20, 30, (4, 4), (1.0, 0.3))
    one, two = truncate(*concatenate(terms), rank=3), approximate(summed(terms), rank=3)
    torch.testing.assert_close(product(one), product(two), rtol=1e-5, atol=1e-5)
    for found in (one, two):
        torch.testing.assert_close(found.left.norm(dim=0), found.right.norm(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_energy_gives_the_least_rank_that_keeps_it(energy):
    delta = random(15, 12)
    values = torch.linalg.svdvals(delta.double()).square()
    wanted = next(r for r in range(1, 13) if values[:r].sum() >= energy * values.sum() * (1 - 1e-12))
    for found in (approximate(delta, energy=energy), truncate(delta, torch.eye(12), energy=energy)):
        assert found.left.shape[1] == wanted
        assert found.error**2 <= 1 - energy + 1e-6


def test_terms_that_cancel_leave_what_is_between_them():
    left, right = random(30, 4), random(4, 20, seed=1)
    near = right + 1e-5 * random(4, 20, seed=2)
    found = truncate(*concatenate([(left, near, 1.0), (left, right, -1.0)]), rank=4)
    expected = left.double() @ (near.double() - right.double())
    torch.testing.assert_close(product(found), expected, rtol=1e-4, atol=1e-9)
    assert found.error < 1e-4


def test_zero_has_no_error():
    for found in (approximate(torch.zeros(4, 3), rank=2), truncate(torch.zeros(4, 2), torch.zeros(2, 3), energy=0.5)):
        assert found.error == found.square == 0
        assert not product(found).any()


@pytest.mark.parametrize(
    ("rank", "energy", "message"),
    [
        (None, None, "a rank is needed"),
        (2, 0.5, "exclude each other"),
        (0, None, "rank must be"),
        (None, 1.5, "energy is"),
    ],
)
def test_ranks_that_make_no_sense_are_refused(rank, energy, message):
    for work in (
        lambda: approximate(torch.ones(2, 2), rank, energy),
        lambda: truncate(torch.ones(2, 1), torch.ones(1, 2), rank, energy),
    ):
        with pytest.raises(ValueError, match=message):
            work()
