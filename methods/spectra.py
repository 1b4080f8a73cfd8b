"""Singular values and directions by matrix products: leading directions, polar factors, projections.

All rest on the eigenvectors of the Gram matrix on the shorter side, which cost a fraction of a full decomposition.
Squaring halves the digits: a Gram matrix tells directions with singular values down to some hundredths of the largest
in float32, to a millionth in float64. Short sides up to 256 run in float64; longer ones in float32, and what that
leaves unresolved is had in float64, or by another look at the rest alone: a relative error of about 1e-5.

Source: Golub & Van Loan, Matrix Computations, sections 8.6 and 9.4; Higham 1986 (the polar factor is the nearest matrix
with orthonormal columns).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from methods.lazy import torch

NULL = 1e-6  # of the largest singular value: what is not above it counts as zero, float32 input has no direction there

_SHORT = 256  # longest short side that runs in float64 from the start
_RESOLVED = 0.05  # of the largest singular value: whose directions a Gram matrix in float32 still tells
_BLOCK = 96  # columns of a Gram matrix that are not split further


class Leading(NamedTuple):
    """u @ diag(s) @ v^T."""

    u: torch.Tensor  # (..., m, k) orthonormal columns; a column is zero where s is
    s: torch.Tensor  # (..., k) falling, at least 0
    v: torch.Tensor  # (..., n, k) orthonormal columns

    def matrix(self) -> torch.Tensor:
        """The product, (..., m, n)."""
        return (self.u * self.s[..., None, :]) @ self.v.mT


def one_thread(rule: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A rule that runs on one thread of the CPU: libraries share large products out, which changes their last bits."""

    @functools.wraps(rule)
    def alone(*args: Any, **extras: Any) -> torch.Tensor:
        before = torch.get_num_threads()
        if before == 1:
            return rule(*args, **extras)
        torch.set_num_threads(1)
        try:
            return rule(*args, **extras)
        finally:
            torch.set_num_threads(before)

    return alone


def gram(tall: torch.Tensor) -> torch.Tensor:
    """A^T A, (..., m, n) -> (..., n, n); the half below the diagonal is copied, not computed."""
    n = tall.shape[-1]
    if n <= _BLOCK or tall.is_cuda:
        return tall.mT @ tall
    product = tall.new_empty(*tall.shape[:-2], n, n)
    half = n // 2
    left, right = tall[..., :half], tall[..., half:]
    product[..., :half, :half] = gram(left)
    product[..., half:, half:] = gram(right)
    product[..., :half, half:] = left.mT @ right
    product[..., half:, :half] = product[..., :half, half:].mT
    return product


def leading(matrices: torch.Tensor, rank: int | Callable[[torch.Tensor], int]) -> Leading:
    """Leading singular triplets, (..., m, n) -> k of them, in float64 for short sides up to 256, else float32.

    A rank above min(m, n) is cut to it. Signs are arbitrary but fixed for given input.

    Args:
        matrices: One or a batch, float32 or float64.
        rank: How many; or, for one matrix, a function of all its singular values (min(m, n),), falling.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        u, s, v = leading(matrices.mT, rank)
        return Leading(v, s, u)
    if matrices.shape[-1] <= _SHORT:
        matrices = matrices.double()
    _, vectors = torch.linalg.eigh(gram(matrices))  # rising
    vectors = vectors.flip(-1)
    if isinstance(rank, int):
        vectors = vectors[..., : min(rank, matrices.shape[-1])]
    projected = matrices @ vectors  # columns as long as singular values
    values = projected.norm(dim=-2)
    if not isinstance(rank, int):
        kept = min(rank(values), len(values))
        projected, values, vectors = projected[:, :kept], values[:kept], vectors[:, :kept]
    if matrices.dtype == torch.float32 and not _resolved(values):
        return Leading(*(part.float() for part in leading(matrices.double(), values.shape[-1])))
    null = values <= NULL * values[..., :1]
    return Leading(projected / values.masked_fill(null, torch.inf)[..., None, :], values.masked_fill(null, 0), vectors)


class Polar(NamedTuple):
    """What is left of a matrix when all its singular values are one, and what they were in sum."""

    factor: torch.Tensor  # (m, n) U V^T
    nuclear_norm: float


def polar(matrix: torch.Tensor) -> Polar:
    """The orthogonal factor U V^T of one matrix, (m, n), in its dtype, and the sum of its singular values.

    Directions whose singular value is below 1e-6 of the largest stay zero, where a full decomposition completes them
    by arbitrary ones: float32 input says nothing of them.
    """
    if matrix.shape[0] < matrix.shape[1]:
        factor, norm = _polar(matrix.t(), None)
        factor = factor.t()
    else:
        factor, norm = _polar(matrix, None)
    return Polar(factor.to(matrix.dtype), norm)


def orthogonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The orthonormal columns nearest to blocks of columns side by side, (m, k_i) each -> (m, sum k_i)."""
    return polar(torch.cat(list(blocks), 1)).factor


def project(matrix: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """B B^T A: what of the columns of A, (..., m, n), lies in the span of B's orthonormal columns, (..., m, k)."""
    return basis @ (basis.mT @ matrix.to(basis.dtype))


def covering(values: torch.Tensor, share: float) -> int:
    """How many of the falling singular values, (r,), make up a share in (0, 1] of their sum; at least one.

    >>> covering(torch.tensor([3.0, 1.0, 1.0]), 0.7)
    2
    """
    sums = values.double().cumsum(0)
    return int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1


def _polar(tall: torch.Tensor, floor: float | None) -> tuple[torch.Tensor, float]:
    """Factor and norm of (m, n), m >= n: of what is resolved, and of the rest by another look at it alone."""
    if tall.shape[1] <= _SHORT:
        tall = tall.double()
    values, vectors = torch.linalg.eigh(gram(tall))  # rising
    values = values.clamp_(min=0).sqrt_()
    largest = float(values[-1])
    floor = NULL * largest if floor is None else floor
    bound = max(floor, largest * (_RESOLVED if tall.dtype == torch.float32 else NULL))
    n_small = int((values <= bound).sum())
    big, small = vectors[:, n_small:], vectors[:, :n_small]
    root = gram((big * values[n_small:].rsqrt()).t())  # (n, n) inverse square root of the Gram matrix
    factor = tall @ root if tall.is_contiguous() else (root @ tall.t()).t()  # laid out as the matrix is
    norm = float(values[n_small:].sum(dtype=torch.float64))
    if n_small and floor < bound:
        rest = tall @ small
        rest -= factor @ (factor.t() @ rest)  # what rounding left of the big directions
        if float(rest.norm()) > floor:
            rest, more = _polar(rest, floor)
            factor.addmm_(rest.to(factor.dtype), small.t())
            norm += more
    return factor, norm


def _resolved(values: torch.Tensor) -> bool:
    """Whether all falling singular values, (..., k), are large enough for float32, or all of a matrix are zero."""
    return not values.numel() or bool((values[..., -1] >= _RESOLVED * values[..., 0]).all())
