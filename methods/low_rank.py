"""Arithmetic on low-rank changes: sums of products left @ right, and the best approximation of a given rank.

Source: Eckart & Young 1936 (the truncated singular value decomposition is the nearest matrix of its rank); the
decomposition of a product of thin factors by two QR decompositions, Golub & Van Loan, Matrix Computations, section 5.4.
Differs: nothing. All of it runs in float64, so that what is left of a sum whose terms cancel is exact enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import at_least, in_unit_interval

_ROWS = 4096  # taken to float64 at a time


@dataclass(frozen=True)
class LowRank:
    """A matrix as left @ right, and how far it is from what it stands for."""

    left: torch.Tensor  # (m, r) float32
    right: torch.Tensor  # (r, n) float32
    square: float  # squared Frobenius norm of what it stands for
    lost: float  # the same of the difference

    @property
    def error(self) -> float:
        """Relative error, in [0, 1]: ||difference|| / ||what it stands for||, 0 where that is zero."""
        return math.sqrt(self.lost / self.square) if self.square else 0.0


def check_rank(rank: int | None, energy: float | None, needed: bool = False) -> None:
    """Refuse a rank below 1, an energy outside (0, 1], both at once, and, where one is needed, neither.

    Raises:
        ValueError: As above.
    """
    if rank is not None:
        at_least("rank", rank, 1)
    if energy is not None:
        in_unit_interval("energy", energy)
    if rank is not None and energy is not None:
        raise ValueError(f"rank and energy exclude each other, got rank {rank} and energy {energy}")
    if needed and rank is None and energy is None:
        raise ValueError("a rank is needed, or an energy, the share of the squared norm to keep")


def concatenate(parts: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of products, exactly: (m, r_i), (r_i, n), weight each -> (m, R), (R, n), R = sum r_i.

    >>> left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    >>> both = concatenate([(left, right, 1.0), (left, right, -0.5)])
    >>> both[0] @ both[1]
    tensor([[1.5000, 2.0000],
            [3.0000, 4.0000]])
    """
    left = torch.cat([left for left, _, _ in parts], dim=1)
    return left, torch.cat([right * weight for _, right, weight in parts], dim=0)


def squared_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Squared Frobenius norm of left @ right, (m, R), (R, n), in O((m + n) R^2)."""
    wide, high = left.double(), right.double()
    return max(float(((wide.t() @ wide) * (high @ high.t())).sum()), 0.0)


def truncate(left: torch.Tensor, right: torch.Tensor, rank: int | None = None, energy: float | None = None) -> LowRank:
    """The best approximation of left @ right, (m, R), (R, n), without ever forming the product: O((m + n) R^2).

    Args:
        left: Any floating dtype.
        right: Likewise.
        rank: At most so many ranks.
        energy: Instead of it, the least rank that keeps this share of the squared norm, in (0, 1].

    Raises:
        ValueError: Neither of the two, or both, or out of range.
    """
    check_rank(rank, energy, needed=True)
    basis, inner = torch.linalg.qr(left.double())  # (m, k), (k, R)
    other, outer = torch.linalg.qr(right.double().t())  # (n, l), (l, R)
    u, values, v = torch.linalg.svd(inner @ outer.t(), full_matrices=False)
    kept = _kept(values.square(), rank, energy)
    root = values[:kept].sqrt()
    return _low_rank(basis @ (u[:, :kept] * root), (root[:, None] * v[:kept]) @ other.t(), values.square(), kept)


def approximate(delta: torch.Tensor, rank: int | None = None, energy: float | None = None) -> LowRank:
    """The best approximation of a matrix, (m, n), from the eigenvectors of its Gram matrix on the shorter side.

    That costs O(m n min(m, n)) with a small constant. Singular values are right down to 1e-8 of the largest.

    Args:
        delta: Any floating dtype.
        rank: At most so many ranks.
        energy: Instead of it, the least rank that keeps this share of the squared norm, in (0, 1].

    Raises:
        ValueError: Neither of the two, or both, or out of range.
    """
    check_rank(rank, energy, needed=True)
    if delta.shape[0] < delta.shape[1]:
        found = approximate(delta.t(), rank, energy)
        return LowRank(found.right.t().contiguous(), found.left.t().contiguous(), found.square, found.lost)
    blocks = delta.split(_ROWS)
    gram = torch.zeros(delta.shape[1], delta.shape[1], dtype=torch.float64)
    for block in blocks:
        wide = block.double()
        gram.addmm_(wide.t(), wide)
    squares, vectors = torch.linalg.eigh(gram)  # rising
    squares, vectors = squares.flip(0).clamp_(min=0), vectors.flip(1)
    kept = _kept(squares, rank, energy)
    projected = torch.cat([block.double() @ vectors[:, :kept] for block in blocks])  # columns as long as the values
    root = squares[:kept].pow(0.25)
    safe = root + root.eq(0)  # a column of length zero stays zero
    return _low_rank(projected / safe, root[:, None] * vectors[:, :kept].t(), squares, kept)


def _kept(squares: torch.Tensor, rank: int | None, energy: float | None) -> int:
    """How many of the falling squared singular values are kept; at least one."""
    if rank is not None:
        return min(rank, len(squares))
    assert energy is not None
    total = squares.sum()
    enough = squares.cumsum(0) >= energy * total * (1 - 1e-12)
    return int(enough.int().argmax()) + 1 if total > 0 else 1


def _low_rank(left: torch.Tensor, right: torch.Tensor, squares: torch.Tensor, kept: int) -> LowRank:
    return LowRank(left.float(), right.float().contiguous(), float(squares.sum()), float(squares[kept:].sum()))
