"""NAN: the experts' weights averaged, each counted by the inverse of its norm.

Source: Si et al. 2025, arXiv:2505.16148 (norm-aware merging): coefficients are proportional to 1 / ||W_i||_F and sum to
one.
Differs: nothing known. The paper derives them from least squares for one linear map, so norms are of each tensor
(scope=tensor); scope=model takes one norm for a whole model. "Parameter norm" is read as that of the weights; those of
fine-tunes of one base are nearly alike, and norm=changes takes the norms of the task vectors. `scale` stretches the
mean change, for merges of many models; it needs a base, as does norm=changes. Zero norms share all the weight.
Formula: merged = sum_i w_i expert_i, w_i = (1 / ||expert_i||) / sum_j (1 / ||expert_j||)
Cost: O(T n) time twice (norms, then the merge), T + 3 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.angles import square_norms
from methods.kinds import Piece, Pieces
from methods.lazy import torch
from methods.parameters import Params, tunable, word
from methods.primitives import add_up


@dataclass(frozen=True)
class NanParams(Params):
    """Parameters of `nan`; also the schema of conf/method/nan.yaml."""

    scale: float = tunable(1.0, low=0.5, high=2.0)  # multiplies the merged change; other than 1 it needs a base
    scope: str = word("tensor", "model")  # tensor: a norm for each tensor; model: one over all weights
    norm: str = word("weights", "changes")  # of the experts' weights, or of their changes, which need a base


def coefficients(pieces: Pieces, params: NanParams) -> list[float]:
    """Coefficient of each expert, T of them, that sum to one.

    Raises:
        ValueError: norm=changes, and there is no base.
    """

    def squares(piece: Piece) -> torch.Tensor:
        if params.norm == "changes" and piece.base is None:
            raise ValueError("norm=changes is of the task vectors and needs a base; without one take norm=weights")
        return square_norms(piece.experts, piece.base if params.norm == "changes" else None)

    norms = sum(pieces(squares), torch.zeros((), dtype=torch.float64)).sqrt()
    given = norms.eq(0).double() if norms.eq(0).any() else 1 / norms
    return (given / given.sum()).tolist()


def nan(base: torch.Tensor | None, experts: torch.Tensor, params: NanParams, *, numbers: list[float]) -> torch.Tensor:
    """Merge one tensor: base (*shape) or None, experts (T, *shape), coefficients -> (*shape), all float32.

    Raises:
        ValueError: `scale` is not 1, and there is no base.
    """
    merged = add_up(experts, numbers)
    if params.scale == 1:
        return merged
    if base is None:
        raise ValueError(
            f"scale multiplies the change from a base, and there is none; leave it at 1, got {params.scale}"
        )
    return merged.sub_(base).mul_(params.scale).add_(base)
