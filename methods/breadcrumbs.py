"""Model Breadcrumbs: of each task vector drop the largest changes and the small ones, tensor by tensor, then merge.

Source: Davari and Belilovsky 2023, arXiv:2312.06795, section 3.
Differs: `density` is the share kept and `gamma` the share of outliers, in mergekit's words; the paper's thresholds are
beta = 1 - density - gamma and 1 - gamma. Where the two come to more than one, fewer outliers are dropped, as in
mergekit; entries as large as the largest or the smallest one kept are kept.
Formula: merged = base + scale * sum_i w_i [low_i <= |delta_i| <= high_i] delta_i, bounds for each tensor and expert
Cost: O(T n) time three times (both bounds, then the merge), 3 T + 3 chunks of memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from methods.kinds import Pieces
from methods.lazy import torch
from methods.parameters import Params, per_expert, share, shares, tunable, word
from methods.primitives import add_up, agreeing, keep_between
from methods.selection import count_kept, kth_largest


@dataclass(frozen=True)
class BreadcrumbsParams(Params):
    """Parameters of `breadcrumbs`; also the schema of conf/method/breadcrumbs.yaml."""

    density: float = share(0.1, low=0.05, high=1.0)  # share of each tensor's change kept, in (0, 1]; 1 keeps all
    gamma: float = tunable(0.01, low=0.0, high=0.1)  # share of it that is largest and dropped, in [0, 1)
    scale: float = tunable(0.3, low=0.0, high=1.5)  # multiplies the merged change
    base_rule: str = word("linear", "ties")  # linear: sum of what is left; ties: elect a sign, merge what agrees
    disjoint: str = word("sum", "mean", "max")  # base_rule=ties: how entries that agree merge: mean, sum or max
    weights: list[float] | None = None  # one for each expert: of its change, and with ties of its vote; null for ones
    densities: list[float] | None = None  # one for each expert, in the place of `density`; null for that

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma is a share in [0, 1), got {self.gamma}; percentages are not accepted")
        shares("densities", self.densities)


@dataclass(frozen=True)
class BreadcrumbsTiesParams(BreadcrumbsParams):
    """Parameters of `breadcrumbs_ties`; also the schema of conf/method/breadcrumbs_ties.yaml."""

    base_rule: str = word(
        "ties",
    )


def bounds(pieces: Pieces, params: BreadcrumbsParams) -> torch.Tensor | None:
    """Smallest and largest magnitude that each expert keeps in a tensor, (2, T); None where all is kept."""
    given, gamma = params.densities or [params.density], params.gamma
    if all(density == 1 for density in given):
        return None

    def walk(function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Iterable[Any]:
        return pieces(lambda piece: function(piece.deltas), limit)

    def shares_of(share: Callable[[float], float]) -> float | list[float]:
        return share(params.density) if params.densities is None else [share(density) for density in given]

    def outliers(share: float, n: int) -> int:
        """Of n entries, by a share that is gamma, or less where less is left beside the density."""
        return n - count_kept(1 - share, n) if share < gamma else int(gamma * n + 1e-6)

    def largest(share: float, n: int) -> int:
        return min(n, outliers(share, n) + 1)

    def smallest(share: float, n: int) -> int:
        return n if share >= 1 else min(n, outliers(gamma, n) + count_kept(share - gamma, n))

    highs = kth_largest(walk, shares_of(lambda density: min(gamma, 1 - density)), largest)
    lows = kth_largest(walk, shares_of(lambda density: min(1.0, density + gamma)), smallest)
    return torch.stack([lows, highs])


def breadcrumbs(
    base: torch.Tensor, experts: torch.Tensor, params: BreadcrumbsParams, *, numbers: torch.Tensor | None
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), bounds (2, T) -> (*shape), all float32.

    Raises:
        ValueError: There are not as many weights as experts.
    """
    weights = None if params.weights is None else per_expert("weights", params.weights, len(experts))
    deltas = experts - base
    if numbers is not None:
        deltas = keep_between(deltas, *numbers)
    if params.base_rule == "linear":
        return base + params.scale * add_up(deltas, weights)
    return base + params.scale * agreeing(deltas, params.disjoint, weights)
