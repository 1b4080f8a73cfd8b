"""SVC, a veneer: what a rule has merged, its singular values shrunk where the experts' changes pile up on a direction.

Source: 2026, arXiv:2602.05536 (singular value calibration; formula as FusionBench 0.2.33 computes it).
Differs: nothing for matrices; `alpha` is the floor of the overlaps, so that singular values may also grow, up to 1 /
alpha times. What is no matrix stays as the rule has merged it. Directions in which the merged change is nil stay nil.
Formula: D = merged - base = U S V^T; a_r = u_r^T D; a_ri = u_r^T delta_i; s_ri = <a_r, a_ri> / |a_ri|^2; S_r <- S_r T
/ sum_i max(s_ri, alpha)
Cost: one eigendecomposition of the Gram matrix of the short side, O(T m n min(m, n)) time, (T + 4) m n numbers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.kinds import Piece
from methods.lazy import torch
from methods.matrices import as_matrices
from methods.parameters import Params, share, word

if TYPE_CHECKING:
    from methods.kinds import Dressed

_NIL = 1e-7  # singular values below this share of the largest are taken for zero
_LEAST = 1e-12  # of a squared norm that is divided by


@dataclass(frozen=True)
class SvcParams(Params):
    """Parameters of `svc`."""

    alpha: float = share(0.1, low=0.05, high=1.0, published=(0.2, 1.0))  # least overlap, in (0, 1]
    matrices: str = word("all", "linear", "conv")  # what is a matrix: all, linear or conv; methods/matrices.py


def svc(piece: Piece, params: SvcParams, numbers: None) -> Dressed:
    """The piece as it is, and the calibration of what the rule makes of it, (*shape) -> (*shape)."""
    if as_matrices(piece.experts, piece.place, params.matrices) is None:
        return piece, lambda merged: merged
    return piece, _calibration(piece, params.alpha)


def _calibration(piece: Piece, alpha: float) -> Callable[[torch.Tensor], torch.Tensor]:
    base = piece.base
    assert base is not None, "a veneer is given the base"

    def calibrated(merged: torch.Tensor) -> torch.Tensor:
        change = (merged - base).flatten(1).double()
        basis = left_directions(change)  # (m, r)
        own = basis.mT @ change  # (r, n)
        overlaps = torch.zeros(basis.shape[1], dtype=change.dtype, device=change.device)
        for delta in piece.deltas:
            theirs = basis.mT @ delta.flatten(1).double()
            overlap = (own * theirs).sum(1) / theirs.square().sum(1).clamp_(min=_LEAST)
            overlaps += overlap.clamp_(min=alpha)
        change += basis @ ((len(piece.experts) / overlaps - 1)[:, None] * own)
        return base + change.float().reshape(base.shape)

    return calibrated


def left_directions(change: torch.Tensor) -> torch.Tensor:
    """Left singular vectors of what is not nil, (m, n) float64 -> (m, r), from the Gram matrix of the short side."""
    m, n = change.shape
    squares, vectors = torch.linalg.eigh(change @ change.mT if m <= n else change.mT @ change)
    kept = squares > _NIL**2 * squares[-1]
    vectors = vectors[:, kept]
    return vectors if m <= n else change @ (vectors / squares[kept].sqrt())
