"""Singular values and directions by products, against full decompositions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import methods.spectra
from methods.spectra import covering, gram, leading, one_thread, orthogonal, polar, project

LONG = (340, 290)  # past what runs in float64


def random(m: int, n: int, seed: int = 0, decay: float = 0.0) -> Tensor:
    """A matrix whose singular values fall by so many powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(m, n, generator=generator, dtype=torch.float64)
    if decay:
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        matrix = (u * torch.logspace(0, -decay, len(vh), dtype=torch.float64)) @ vh
    return matrix.float()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def orthogonal_factor(matrix: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u * (s > methods.spectra.NULL * s[0])) @ vh


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 6), (6, 1), (60, 60), LONG])
@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_leading_directions_are_those_of_a_full_decomposition(shape: tuple[int, int], decay: float) -> None:
    matrix = random(*shape, decay=decay)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    for rank in {1, min(shape) // 2 or 1, min(shape)}:
        found = leading(matrix, rank)
        assert found.u.shape == (shape[0], rank)
        assert found.v.shape == (shape[1], rank)
        assert relative(found.matrix(), (u[:, :rank] * s[:rank]) @ vh[:rank]) < 1e-5
        torch.testing.assert_close(found.s.double(), s[:rank], rtol=1e-5, atol=1e-6 * float(s[0]))
        for side in (found.u, found.v):
            torch.testing.assert_close(side.mT @ side, torch.eye(rank).to(side), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 6), (6, 1), (60, 60), LONG[::-1], (290, 290)])
@pytest.mark.parametrize(("decay", "error"), [(0.0, 5e-5), (4.0, 1e-3)])
def test_the_polar_factor_is_that_of_a_full_decomposition(shape: tuple[int, int], decay: float, error: float) -> None:
    matrix = random(*shape, decay=decay)
    factor, norm = polar(matrix)
    assert relative(factor, orthogonal_factor(matrix)) < error
    assert norm == pytest.approx(float(torch.linalg.svdvals(matrix.double()).sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 12), LONG])
def test_directions_without_a_change_stay_zero(shape: tuple[int, int]) -> None:
    thin = random(shape[0], 3), random(3, shape[1], seed=1)
    matrix = (thin[0].double() @ thin[1].double()).float()
    factor = polar(matrix).factor.double()
    assert relative(factor, orthogonal_factor(matrix)) < 1e-5
    assert abs(float(factor.square().sum()) - 3) < 1e-5
    found = leading(matrix, 5)
    assert torch.count_nonzero(found.s) == 3
    assert found.u[:, 3:].abs().max() == 0


@pytest.mark.parametrize("shape", [(4, 3), LONG])
def test_zero_has_no_direction(shape: tuple[int, int]) -> None:
    assert polar(torch.zeros(shape)).factor.abs().max() == 0
    assert leading(torch.zeros(shape), 2).matrix().abs().max() == 0


def test_a_batch_is_its_matrices() -> None:
    batch = torch.stack([random(9, 6, seed) for seed in range(3)])
    found = leading(batch, 2)
    for index, matrix in enumerate(batch):
        torch.testing.assert_close(found.matrix()[index], leading(matrix, 2).matrix())


def test_the_rank_may_depend_on_the_values_and_is_cut_to_what_there_is() -> None:
    matrix = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert leading(matrix, lambda values: covering(values, 0.7)).s.tolist() == pytest.approx([4, 3])
    assert leading(matrix, 9).s.tolist() == pytest.approx([4, 3, 2, 1])


@pytest.mark.parametrize(("share", "count"), [(0.3, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.9, 3), (1.0, 4)])
def test_how_many_values_cover_a_share(share: float, count: int) -> None:
    assert covering(torch.tensor([4.0, 3.0, 2.0, 1.0]), share) == count


@given(m=st.integers(1, 9), n=st.integers(1, 9), seed=st.integers(0, 999))
def test_the_polar_factor_turns_with_its_matrix(m: int, n: int, seed: int) -> None:
    """Q A R has the factor Q polar(A) R; only well separated from rank deficiency is it the same to rounding."""
    matrix = random(m, n, seed, decay=0.5)
    left, right = polar(random(m, m, seed + 1)).factor, polar(random(n, n, seed + 2)).factor
    turned, plain = polar(left @ matrix @ right), polar(matrix)
    torch.testing.assert_close(turned.factor, left @ plain.factor @ right, rtol=0, atol=1e-4)
    assert turned.nuclear_norm == pytest.approx(plain.nuclear_norm, rel=1e-5)


def test_projections_keep_what_they_have_kept() -> None:
    basis = orthogonal([random(8, 1), random(8, 2, 2)])
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3))
    once = project(random(8, 4, 1), basis)
    torch.testing.assert_close(project(once, basis), once)
    torch.testing.assert_close(basis.mT @ once, basis.mT @ random(8, 4, 1))


@pytest.mark.parametrize("n", [1, 5, 192, 193, 400])
def test_gram_matrices(n: int) -> None:
    tall = random(11, n)
    torch.testing.assert_close(gram(tall), tall.mT @ tall)


def test_one_thread_is_for_the_rule_only() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert one_thread(lambda: torch.tensor(torch.get_num_threads()))() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
