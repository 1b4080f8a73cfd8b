"""TIES merging: trim each expert's change, elect one sign per weight, merge what agrees.

Source: Yadav et al. 2023, arXiv:2306.01708, Algorithm 1.
Differs: nothing with scope=model, disjoint=mean and no weights. scope=tensor trims each tensor on its own, as mergekit
does; weights are mergekit's: they count in the vote, and the mean is divided by the sum of those that agree.
Exactly the given share is kept, where the authors' code and FusionBench keep one entry more; an exactly zero vote
merges nothing, where FusionBench takes the majority sign of the whole model and mergekit plus. elect=count is peft's
vote of one expert, one vote; rescale=l1 is mergekit's.
Formula: merged = base + scale * mean of those trim(delta_i) whose sign is that of sum_i trim(delta_i), entry by entry
Cost: O(T n) time twice (thresholds, then the merge), 3 T + 4 chunks of memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from methods.kinds import Pieces
from methods.lazy import torch
from methods.parameters import Params, per_expert, share, shares, tunable, word
from methods.primitives import agreeing, keep_above, l1_factors, norms, trim
from methods.ranking import Ranked, rank
from methods.selection import kth_largest


@dataclass(frozen=True)
class TiesParams(Params):
    """Parameters of `ties`; also the schema of conf/method/ties.yaml."""

    density: float = share(0.2, low=0.05, high=1.0)  # share of each expert's change kept, in (0, 1]
    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change (lambda in the paper)
    scope: str = word("model", "tensor")  # model: trim over all weights at once; tensor: trim each tensor on its own
    disjoint: str = word("mean", "sum", "max")  # how entries that agree merge: mean, sum or max
    elect: str = word("mass", "count")  # the sign is that of the sum of changes (mass) or of most experts (count)
    rescale: str = word("none", "l1")  # what is kept: as it is, or multiplied to the L1 norm of all (l1)
    weights: list[float] | None = None  # one for each expert: of its vote and of its change; null for ones
    densities: list[float] | None = None  # one for each expert, in the place of `density`; null for that

    def __post_init__(self) -> None:
        super().__post_init__()
        shares("densities", self.densities)


def thresholds(pieces: Pieces, params: TiesParams, kept: Ranked | None = None) -> torch.Tensor | None:
    """Smallest magnitude that each expert keeps, (T,), over the model or a tensor; None where all is kept.

    With factors to multiply what is kept by, (2, T), where it is rescaled.
    """
    densities = params.densities or params.density
    if densities == 1 or densities == [1.0] * len(params.densities or ()):
        return None

    def walk(function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Iterable[Any]:
        return pieces(lambda piece: function(piece.deltas), limit)

    found = kth_largest(walk, densities) if kept is None else kept.kth_largest(densities)
    if params.rescale == "none":
        return found
    return torch.stack([found, l1_factors(walk(lambda deltas: (norms(deltas), norms(keep_above(deltas, found)))))])


def magnitudes(pieces: Pieces) -> Ranked:
    """The task vectors' magnitudes in order, from which the thresholds of any density are had."""
    return rank(list(pieces(lambda piece: piece.deltas.flatten(1))))


def prepared(params: TiesParams) -> tuple[str, ...]:
    """What `thresholds` reads once for the whole model, and so cannot differ from tensor to tensor."""
    return ("density", "densities") if params.scope == "model" else ()


def ties(
    base: torch.Tensor, experts: torch.Tensor, params: TiesParams, *, numbers: torch.Tensor | None
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), thresholds (T,) -> (*shape), all float32.

    Raises:
        ValueError: There are not as many weights as experts.
    """
    weights = None if params.weights is None else per_expert("weights", params.weights, len(experts))
    deltas = trim(experts - base, numbers)
    return base + params.scale * agreeing(deltas, params.disjoint, weights, params.elect)
