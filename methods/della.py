"""DELLA: drop entries of each task vector at random, small ones of a row more likely, rescale the rest, then merge.

Source: Deep et al. 2024, arXiv:2406.11617, section 3 (MagPrune, elect, fuse).
Differs: `density` is the share kept, one minus the paper's drop rate p, and `epsilon` half of the paper's window: the
probability of keeping runs from density - epsilon for the smallest of a row to density + epsilon for the largest, as in
mergekit; a row of one entry keeps it with the density, where mergekit divides by zero. Kernels have a row for each
output filter. Survivors are divided by their own probability; rescale=l1 is mergekit's matching of each tensor's norm.
Formula: merged = base + scale * (mean of the kept delta_ij / p_ij with the elected sign), for each entry j
Cost: O(T n log(row)) time, 2 T + 8 numbers for each entry of a tensor
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.lazy import torch
from methods.parameters import Params, at_least, one_of, per_expert, share, shares, tunable, word
from methods.primitives import add_up, agreeing, drop, l1_factors, norms, row_ranks

if TYPE_CHECKING:
    from methods.kinds import Draw


@dataclass(frozen=True)
class DellaParams(Params):
    """Parameters of `della`; also the schema of conf/method/della.yaml."""

    density: float = share(0.5, low=0.2, high=0.8)  # mean probability that an entry is kept, in (0, 1]; 1 keeps all
    epsilon: float = tunable(0.15, low=0.0, high=0.19)  # how far a row's probabilities go from it, to either side
    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change
    rescale: str = "share"  # survivors: divided by their probability (share), to the L1 norm of all (l1), or none
    base_rule: str = word("ties", "linear")  # ties: elect a sign, merge what agrees; linear: sum of what is left
    disjoint: str = word("mean", "sum", "max")  # base_rule=ties: how entries that agree merge: mean, sum or max
    weights: list[float] | None = None  # one for each expert: of its change, and with ties of its vote; null for ones
    densities: list[float] | None = None  # one for each expert, in the place of `density`; null for that

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("epsilon", self.epsilon, 0)
        one_of("rescale", self.rescale, ("share", "l1", "none"))
        shares("densities", self.densities)
        for density in self.densities or [self.density]:
            if density < 1 and not self.epsilon < density <= 1 - self.epsilon:
                raise ValueError(
                    f"entries are kept with probabilities density - epsilon to density + epsilon, in (0, 1], "
                    f"got density {density} and epsilon {self.epsilon}; choose a smaller epsilon"
                )


@dataclass(frozen=True)
class DellaLinearParams(DellaParams):
    """Parameters of `della_linear`; also the schema of conf/method/della_linear.yaml."""

    scale: float = tunable(0.3, low=0.0, high=1.5)  # multiplies the merged change
    base_rule: str = word(
        "linear",
    )


def della(base: torch.Tensor, experts: torch.Tensor, params: DellaParams, *, draw: Draw) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32.

    Raises:
        ValueError: There are not as many weights or densities as experts.
    """
    weights = None if params.weights is None else per_expert("weights", params.weights, len(experts))
    densities = per_expert("densities", params.densities or params.density, len(experts))
    deltas = torch.stack(
        [
            _pruned(expert - base, draw, index, density, params)
            for index, (expert, density) in enumerate(zip(experts, densities, strict=True))
        ]
    )
    if params.base_rule == "linear":
        return base + params.scale * add_up(deltas, weights)
    return base + params.scale * agreeing(deltas, params.disjoint, weights)


def _pruned(delta: torch.Tensor, draw: Draw, index: int, density: float, params: DellaParams) -> torch.Tensor:
    """What is left of one task vector, (*shape)."""
    if density == 1:
        return delta
    chances = row_ranks(delta).mul_(2 * params.epsilon).add_(density - params.epsilon)
    left = drop(delta, draw(index), chances, params.rescale == "share")
    if params.rescale == "l1":
        left *= float(l1_factors([(norms(delta[None]), norms(left[None]))]))
    return left
