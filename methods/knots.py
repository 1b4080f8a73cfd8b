"""KnOTS, a veneer: the changes are turned into the joint basis of all of them before a rule merges, and back after it.

Source: Stoica et al. 2025, arXiv:2410.19735 (one singular value decomposition of the changes side by side).
Differs: the rule is given S V_i^T (each change's coordinates, singular values included), as FusionBench aligns them;
the paper also tries V_i^T alone. The basis is had from the Gram matrix of the sides put next to each other, which the
paper's decomposition has for its left factor; directions below `eps` are dropped. What is no matrix is merged as it
is. A rule that is linear in the changes gives the same with and without; a rule that trims or votes does not.
Formula: [delta_1 ... delta_T] = U S [V_1^T ... V_T^T]; merged = base + U rule(0, {S V_i^T})
Cost: O(T m^2 n + m^3) time, (2 T + 2) m n numbers
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from methods.kinds import Piece
from methods.lazy import torch
from methods.matrices import as_matrices
from methods.parameters import Params, at_least, word

if TYPE_CHECKING:
    from methods.kinds import Draw, Dressed


@dataclass(frozen=True)
class KnotsParams(Params):
    """Parameters of `knots`."""

    eps: float = 1e-4  # singular values up to this are dropped, at least 0
    matrices: str = word("all", "linear", "conv")  # what is a matrix: all, linear or conv; methods/matrices.py

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("eps", self.eps, 0)


def knots(piece: Piece, params: KnotsParams, numbers: None) -> Dressed:
    """The piece in the joint basis, base zero and experts (T, r, n), and the way back, (r, n) -> (*shape)."""
    base = piece.base
    assert base is not None, "a veneer is given the base"
    if as_matrices(piece.experts, piece.place, params.matrices) is None:
        return piece, lambda merged: merged
    deltas = piece.deltas.flatten(2)
    basis = joint_basis(deltas, params.eps)
    aligned = basis.mT @ deltas  # (T, r, n)
    turned = replace(piece, base=torch.zeros_like(aligned[0]), experts=aligned, draw=_first_rows(piece, aligned))

    def back(merged: torch.Tensor) -> torch.Tensor:
        return base + (basis @ merged).reshape(base.shape)

    return turned, back


def joint_basis(deltas: torch.Tensor, eps: float) -> torch.Tensor:
    """Left singular vectors of the changes side by side, (T, m, n) -> (m, r) float32, largest first, r at least 1."""
    gram = torch.zeros(deltas.shape[1], deltas.shape[1], dtype=torch.float64, device=deltas.device)
    for delta in deltas:
        wide = delta.double()
        gram.addmm_(wide, wide.mT)
    squares, vectors = torch.linalg.eigh(gram)  # rising
    largest = min(deltas.shape[1], deltas.shape[0] * deltas.shape[2])  # there are no more directions
    kept = min(max(int((squares > eps**2).sum()), 1), largest)
    return vectors[:, -kept:].flip(1).float()


def _first_rows(piece: Piece, aligned: torch.Tensor) -> Draw | None:
    """Random numbers for the turned changes: as many of the piece's own rows as there are directions."""
    draw = piece.draw
    if draw is None:
        return None
    return lambda index: draw(index).flatten(1)[: aligned.shape[1]]
