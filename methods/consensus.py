"""Consensus merging: of the merged change keep what matters to several experts, as their TALL masks tell.

Source: Wang et al. 2024, arXiv:2405.07813: TALL masks, and their agreement.
Differs: nothing; consensus_ties builds on TIES of the whole model with the sum of what agrees, as the authors' code.
Formula: merged = base + scale * [sum_i m_i >= agree] multi, m_i = [|delta_i| > selectivity |multi - delta_i|]
Cost: O(T n) time, T + 6 chunks of memory; consensus_ties a second pass for thresholds and 3 T + 8 chunks
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import Params, at_least, per_expert, share, shares, tunable, word
from methods.primitives import agreeing, changes, tall_mask, trim


@dataclass(frozen=True)
class ConsensusTaParams(Params):
    """Parameters of `consensus_ta`; also the schema of conf/method/consensus_ta.yaml."""

    scale: float = tunable(0.3, low=0.0, high=1.5)  # multiplies what is left of the merged change
    agree: int = tunable(2, low=1, high=2)  # to how many experts a weight must matter, at least 0
    selectivity: float = tunable(0.3, low=0.2, high=0.6, published=(0.4,))  # lambda, at least 0: larger keeps fewer
    selectivities: list[float] | None = None  # one for each expert, in the place of `selectivity`; null for that

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("agree", self.agree, 0)
        at_least("selectivity", self.selectivity, 0)
        if self.selectivities is not None:
            for value in self.selectivities:
                at_least("selectivities", value, 0)


@dataclass(frozen=True)
class ConsensusTiesParams(ConsensusTaParams):
    """Parameters of `consensus_ties`; also the schema of conf/method/consensus_ties.yaml."""

    density: float = share(0.2, low=0.05, high=1.0)  # share of each expert's change kept by TIES, in (0, 1]
    densities: list[float] | None = None  # one for each expert, in the place of `density`; null for that
    scope: str = word("model", "tensor")  # model: trim over all weights at once; tensor: trim each tensor on its own
    disjoint: str = word("sum", "mean", "max")  # how entries that agree merge: mean, sum or max
    rescale: str = word("none", "l1")  # what TIES keeps: as it is, or multiplied to the L1 norm of all (l1)

    def __post_init__(self) -> None:
        super().__post_init__()
        shares("densities", self.densities)


def consensus_ta(base: torch.Tensor, experts: torch.Tensor, params: ConsensusTaParams) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32.

    Raises:
        ValueError: There are fewer experts than must agree, or not as many selectivities as experts.
    """
    return _agreed(base, experts, changes(base, experts), params)


def consensus_ties(
    base: torch.Tensor, experts: torch.Tensor, params: ConsensusTiesParams, *, numbers: torch.Tensor | None
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), thresholds of TIES -> (*shape), all float32.

    Raises:
        ValueError: As for `consensus_ta`.
    """
    return _agreed(base, experts, agreeing(trim(experts - base, numbers), params.disjoint), params)


def _agreed(base: torch.Tensor, experts: torch.Tensor, multi: torch.Tensor, params: ConsensusTaParams) -> torch.Tensor:
    """The base and what is left of the multi-task vector, (*shape)."""
    if params.agree > len(experts):
        raise ValueError(f"agree is {params.agree} for {len(experts)} experts; nothing would be left, lower it")
    selectivities = per_expert("selectivities", params.selectivities or params.selectivity, len(experts))
    votes = torch.zeros_like(base)
    for expert, selectivity in zip(experts, selectivities, strict=True):
        votes += tall_mask(expert - base, multi, selectivity)
    kept = votes.sub_(params.agree - 0.5).sign_().relu_()  # 1 where enough experts agree
    return kept.mul_(multi).mul_(params.scale).add_(base)
