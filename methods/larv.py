"""LARV, a veneer: each expert's change is scaled layer by layer, by how concentrated it is beside the base.

Source: Wang et al. 2026, arXiv:2602.09413 (effective-rank contrast of a layer, tiers of fixed scales).
Differs: the paper weighs two diagnostics of a layer; only the effective-rank contrast could be pinned down and is
used. An expert's layers are put in three tiers of equal size by their mean contrast over the layer's matrices: the
lowest takes `low`, the middle stays, the highest takes `high`; the paper's own values are not known here, so both are
parameters. What lies in no block stays.
Formula: e_l = r(base_l) / r(delta_l), r(A) = exp(-sum_j p_j ln p_j), p_j = S_j^2 / |A|^2; delta_l <- s_l delta_l
Cost: one look at all weights, O(T m n min(m, n)) time for a matrix, m n numbers
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from methods.kinds import Piece, Pieces
from methods.lazy import torch
from methods.matrices import as_matrices
from methods.parameters import Params, tunable, word
from methods.primitives import spread

if TYPE_CHECKING:
    from methods.kinds import Dressed

_LEAST = 1e-30  # of a squared norm that is divided by


@dataclass(frozen=True)
class LarvParams(Params):
    """Parameters of `larv`."""

    low: float = tunable(0.8, low=0.0, high=1.0)  # scale of the layers whose changes are the most diffuse
    high: float = tunable(1.2, low=1.0, high=2.0)  # scale of the layers whose changes are the most concentrated
    matrices: str = word("linear", "all", "conv")  # what is a matrix: methods/matrices.py


def factors(pieces: Pieces, params: LarvParams) -> dict[int, torch.Tensor]:
    """Scale of every expert's change by layer, (T,) each."""
    sums: dict[int, list[torch.Tensor]] = defaultdict(list)
    for layer, contrast in pieces(lambda piece: (piece.place.layer, _contrast(piece, params.matrices))):
        if contrast is not None:
            sums[layer].append(contrast)
    if not sums:
        return {}
    layers = sorted(sums)
    contrasts = torch.stack([torch.stack(sums[layer]).mean(0) for layer in layers])  # (L, T)
    places = contrasts.argsort(dim=0, stable=True).argsort(dim=0).double()  # 0 for the lowest
    tiers = ((places + 0.5) / len(layers) * 3).floor()  # 0, 1, 2; of a single layer the middle one
    scales = torch.tensor([params.low, 1.0, params.high])[tiers.long()]
    return dict(zip(layers, scales, strict=True))


def larv(piece: Piece, params: LarvParams, numbers: dict[int, torch.Tensor]) -> Dressed:
    """The piece with its experts' changes scaled, (T, *shape); what the rule makes of it stays."""
    scales = numbers.get(piece.place.layer)
    if scales is None or piece.base is None:
        return piece, lambda merged: merged
    scaled = piece.deltas.mul_(spread(scales, piece.experts)).add_(piece.base)
    return replace(piece, experts=scaled), lambda merged: merged


def _contrast(piece: Piece, matrices: str) -> torch.Tensor | None:
    """Effective rank of the base over that of each change, (T,) float64; None for what is in no block or no matrix."""
    inside = 1 <= piece.place.layer <= piece.place.n_layers
    if not inside or piece.base is None or as_matrices(piece.experts, piece.place, matrices) is None:
        return None
    own = effective_rank(piece.base.flatten(1))
    return torch.tensor([own / effective_rank(delta.flatten(1)) for delta in piece.deltas], dtype=torch.float64)


def effective_rank(matrix: torch.Tensor) -> float:
    """Exponential of the entropy of the squared singular values' shares, (m, n) -> from 1 to min(m, n); nil is 1.

    >>> round(effective_rank(torch.eye(3)), 6)
    3.0
    """
    return entropy_rank(singular_squares(matrix))


def singular_squares(matrix: torch.Tensor) -> torch.Tensor:
    """Squared singular values, rising, (m, n) -> (min(m, n),) float64."""
    wide = matrix.double()
    return torch.linalg.eigvalsh(wide @ wide.mT if len(wide) <= wide.shape[1] else wide.mT @ wide).clamp_(min=0)


def entropy_rank(squares: torch.Tensor) -> float:
    """Effective rank from the squared singular values, (r,)."""
    shares = squares / squares.sum().clamp(min=_LEAST)
    return float(torch.special.entr(shares).sum().exp())
