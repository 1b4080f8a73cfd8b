"""DARE: drop entries of each task vector at random, rescale the rest, then merge by task arithmetic or TIES.

Source: Yu et al. 2024, arXiv:2311.03099, equation 3.
Differs: nothing; survivors are divided by the density, where mergekit matches the L1 norm of each tensor instead.
`density` is the share kept, one minus the paper's drop rate p. With base_rule=ties the dropped zeros count in the
trimmed share, as in FusionBench, and exactly that share is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.kinds import Piece, Pieces
from methods.lazy import torch
from methods.parameters import finite, in_unit_interval, one_of, per_expert, shares, tunable
from methods.primitives import add_up, agreeing, drop, keep_above
from methods.selection import kth_largest

if TYPE_CHECKING:
    from methods.kinds import Draw


@dataclass(frozen=True)
class DareParams:
    """Parameters of `dare`; also the schema of conf/method/dare.yaml."""

    density: float = tunable(0.5, low=0.05, high=1.0, published=(0.1,))  # probability that an entry is kept, in (0, 1]
    scale: float = tunable(0.3, low=0.0, high=1.5)  # multiplies the merged change
    rescale: bool = True  # divide the survivors by the density
    base_rule: str = "linear"  # linear: sum of what is left; ties: trim and elect first
    trim: float = tunable(0.2, low=0.05, high=1.0)  # base_rule=ties: share kept by magnitude, in (0, 1]
    scope: str = "model"  # base_rule=ties: trim over the model or each tensor
    disjoint: str = "mean"  # base_rule=ties: how entries that agree merge: mean, sum or max
    weights: list[float] | None = None  # one for each expert: of its change, and with ties of its vote; null for ones
    densities: list[float] | None = None  # one for each expert, in the place of `density`; null for that

    def __post_init__(self) -> None:
        in_unit_interval("density", self.density)
        finite("scale", self.scale)
        one_of("base_rule", self.base_rule, ("linear", "ties"))
        in_unit_interval("trim", self.trim)
        one_of("scope", self.scope, ("model", "tensor"))
        one_of("disjoint", self.disjoint, ("mean", "sum", "max"))
        if self.weights is not None:
            finite("weights", self.weights)
        shares("densities", self.densities)


def thresholds(pieces: Pieces, params: DareParams) -> torch.Tensor | None:
    """base_rule=ties: smallest magnitude that each expert keeps after the drop, (T,); otherwise None."""
    if params.base_rule == "linear" or params.trim == 1:
        return None

    def walk(function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Iterable[Any]:
        return pieces(lambda piece: function(_dropped(piece, params)), limit)

    return kth_largest(walk, params.trim)


def prepared(params: DareParams) -> tuple[str, ...]:
    """What `thresholds` reads once for the whole model, and so cannot differ from tensor to tensor."""
    return ("density", "densities", "trim") if params.base_rule == "ties" and params.scope == "model" else ()


def dare(
    base: torch.Tensor, experts: torch.Tensor, params: DareParams, *, numbers: torch.Tensor | None, draw: Draw
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), thresholds (T,) -> (*shape), all float32.

    Raises:
        ValueError: There are not as many weights or densities as experts.
    """
    weights = None if params.weights is None else per_expert("weights", params.weights, len(experts))
    deltas = _dropped(Piece("", base, experts, draw), params)
    if params.base_rule == "linear":
        return base + params.scale * add_up(deltas, weights)
    if numbers is not None:
        deltas = keep_above(deltas, numbers)
    return base + params.scale * agreeing(deltas, params.disjoint, weights)


def _dropped(piece: Piece, params: DareParams) -> torch.Tensor:
    """The task vectors after dropping, (T, *shape)."""
    deltas, draw = piece.deltas, piece.draw
    densities = per_expert("densities", params.densities or params.density, len(deltas))
    if all(density == 1 for density in densities):
        return deltas
    assert draw is not None, "the row says that its method draws"
    left = [
        delta if density == 1 else drop(delta, draw(index), density, params.rescale)
        for index, (delta, density) in enumerate(zip(deltas, densities, strict=True))
    ]
    return torch.stack(left)
