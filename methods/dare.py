"""DARE: drop entries of each task vector at random, rescale the rest, then merge by task arithmetic or TIES.

Source: Yu et al. 2024, arXiv:2311.03099, equation 3.
Differs: nothing; survivors are divided by the density; rescale=l1 with scope=tensor is mergekit's matching of norms.
`density` is the share kept, one minus the paper's drop rate p. With base_rule=ties the dropped zeros count in the
trimmed share, as in FusionBench, and exactly that share is kept.
Formula: merged = base + scale * sum_i w_i mask_i delta_i / density, mask_i one with probability density
Cost: O(T n) time, 3 T + 3 chunks of memory; with base_rule=ties a second pass for thresholds
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.kinds import Piece, Pieces
from methods.lazy import torch
from methods.parameters import Params, one_of, per_expert, share, shares, tunable, word
from methods.primitives import add_up, agreeing, drop, l1_factors, norms, trim
from methods.selection import kth_largest

if TYPE_CHECKING:
    from methods.kinds import Draw


@dataclass(frozen=True)
class DareParams(Params):
    """Parameters of `dare`; also the schema of conf/method/dare.yaml."""

    density: float = share(0.5, low=0.05, high=1.0, published=(0.1,))  # probability that an entry is kept, in (0, 1]
    scale: float = tunable(0.3, low=0.0, high=1.5)  # multiplies the merged change
    rescale: str = "share"  # survivors: divided by the density (share), to the L1 norm of all (l1), as they are (none)
    base_rule: str = word("linear", "ties")  # linear: sum of what is left; ties: trim and elect first
    trim: float = share(0.2, low=0.05, high=1.0, when=("base_rule", "ties"))  # share kept by magnitude, in (0, 1]
    scope: str = "model"  # base_rule=ties and rescale=l1: trim, match norms over the model or each tensor
    disjoint: str = word("mean", "sum", "max")  # base_rule=ties: how entries that agree merge: mean, sum or max
    weights: list[float] | None = None  # one for each expert: of its change, and with ties of its vote; null for ones
    densities: list[float] | None = None  # one for each expert, in the place of `density`; null for that

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("rescale", self.rescale, ("share", "l1", "none"))
        one_of("scope", self.scope, ("model", "tensor"))
        shares("densities", self.densities)


@dataclass(frozen=True)
class DareTiesParams(DareParams):
    """Parameters of `dare_ties`; also the schema of conf/method/dare_ties.yaml."""

    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change
    base_rule: str = word("ties")


def thresholds(pieces: Pieces, params: DareParams) -> torch.Tensor | None:
    """Smallest magnitude that each expert keeps after the drop, (T,), with rescale=l1 also factors, (2, T).

    None where nothing is trimmed or rescaled so.
    """

    def walk(function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Iterable[Any]:
        return pieces(lambda piece: function(_dropped(piece, params)), limit)

    trims = params.base_rule == "ties" and params.trim < 1
    found = kth_largest(walk, params.trim) if trims else None
    if params.rescale != "l1":
        return found
    factors = l1_factors(pieces(lambda piece: (norms(piece.deltas), norms(_dropped(piece, params)))))
    return torch.stack([torch.zeros_like(factors) if found is None else found, factors])


def prepared(params: DareParams) -> tuple[str, ...]:
    """What `thresholds` reads once for the whole model, and so cannot differ from tensor to tensor."""
    if params.scope == "tensor":
        return ()
    return ("density", "densities", "trim") if params.base_rule == "ties" or params.rescale == "l1" else ()


def dare(
    base: torch.Tensor, experts: torch.Tensor, params: DareParams, *, numbers: torch.Tensor | None, draw: Draw
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), `thresholds` -> (*shape), all float32.

    Raises:
        ValueError: There are not as many weights or densities as experts.
    """
    weights = None if params.weights is None else per_expert("weights", params.weights, len(experts))
    piece = Piece("", base, experts, draw)
    if params.base_rule == "linear" and numbers is None:  # one expert at a time: no more than its chunk is in the cache
        total = torch.zeros_like(base)
        for index, delta in enumerate(_each_dropped(piece, params)):
            total += delta if weights is None else delta.mul_(weights[index])
        return total.mul_(params.scale).add_(base)
    deltas = trim(_dropped(piece, params), numbers)
    if params.base_rule == "linear":
        return base + params.scale * add_up(deltas, weights)
    return base + params.scale * agreeing(deltas, params.disjoint, weights)


def _dropped(piece: Piece, params: DareParams) -> torch.Tensor:
    """The task vectors after dropping, (T, *shape)."""
    return torch.stack(list(_each_dropped(piece, params)))


def _each_dropped(piece: Piece, params: DareParams) -> Iterator[torch.Tensor]:
    """The same one after the other, each in memory of its own."""
    base, draw = piece.base, piece.draw
    densities = per_expert("densities", params.densities or params.density, len(piece.experts))
    for index, (expert, density) in enumerate(zip(piece.experts, densities, strict=True)):
        delta = expert - base
        if density < 1:
            assert draw is not None, "the row says that its method draws"
            delta = drop(delta, draw(index), density, params.rescale == "share")
        yield delta
