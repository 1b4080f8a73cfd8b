"""TIES merging: trim each expert's change, elect one sign per weight, merge what agrees.

Source: Yadav et al. 2023, arXiv:2306.01708, Algorithm 1.
Differs: nothing with scope=model and disjoint=mean. scope=tensor trims each tensor on its own, as mergekit does.
Exactly the given share is kept, where the authors' code and FusionBench keep one entry more; an exactly zero vote
merges nothing, where FusionBench takes the majority sign of the whole model and mergekit plus.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Pieces
from methods.lazy import torch
from methods.parameters import finite, in_unit_interval, one_of, tunable
from methods.primitives import agreeing, keep_above
from methods.selection import kth_largest


@dataclass(frozen=True)
class TiesParams:
    """Parameters of `ties`; also the schema of conf/method/ties.yaml."""

    density: float = tunable(0.2, low=0.05, high=1.0)  # share of each expert's change kept, in (0, 1]
    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change (lambda in the paper)
    scope: str = "model"  # model: trim over all weights at once; tensor: trim each tensor on its own
    disjoint: str = "mean"  # how entries that agree merge: mean, sum or max

    def __post_init__(self) -> None:
        in_unit_interval("density", self.density)
        finite("scale", self.scale)
        one_of("scope", self.scope, ("model", "tensor"))
        one_of("disjoint", self.disjoint, ("mean", "sum", "max"))


def thresholds(pieces: Pieces, params: TiesParams) -> torch.Tensor | None:
    """Smallest magnitude that each expert keeps, (T,), over the model or a tensor; None where all is kept."""
    if params.density == 1:
        return None
    return kth_largest(lambda: (piece.deltas for piece in pieces()), params.density)


def ties(
    base: torch.Tensor, experts: torch.Tensor, params: TiesParams, *, numbers: torch.Tensor | None
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), thresholds (T,) -> (*shape), all float32."""
    deltas = experts - base
    if numbers is not None:
        deltas = keep_above(deltas, numbers)
    return base + params.scale * agreeing(deltas, params.disjoint)
