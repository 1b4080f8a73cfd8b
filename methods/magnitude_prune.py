"""Magnitude pruning: of each task vector, or of an expert's weights, keep what is largest in every row.

Source: Han et al. 2015, arXiv:1506.02626, in rows as Sun et al. 2023, arXiv:2306.11695; of changes as FusionBench's
magnitude_diff_pruning and the `magnitude_prune` of peft.
Differs: every tensor is pruned, biases as one row and kernels by output filter, where FusionBench leaves all but linear
weights at the base; rescale=share divides by the share kept, where FusionBench divides by the share pruned; at least
one entry of a row is kept.
Formula: merged = base + scale * sum_i w_i kept(expert_i - base); of=weights: scale * sum_i w_i (kept(expert_i) - base)
Cost: O(T n log(row)) time, T + 5 numbers for each entry of a tensor
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import Params, one_of, per_expert, share, tunable, word
from methods.primitives import keep_in_rows, l1_factors, norms, rows_of
from methods.selection import count_kept


@dataclass(frozen=True)
class MagnitudePruneParams(Params):
    """Parameters of `magnitude_prune`; also the schema of conf/method/magnitude_prune.yaml."""

    density: float = share(0.5, low=0.05, high=1.0)  # share kept, in (0, 1]
    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change
    of: str = word("change", "weights")  # what is pruned: the experts' changes, or their weights
    prune: str = word("minor", "major")  # what goes: the smallest in magnitude (minor) or the largest (major)
    scope: str = word("row", "tensor")  # keep the share of each row, or of each tensor
    rescale: str = "none"  # what is kept: as it is, divided by its share, or multiplied to the L1 norm of all (l1)
    weights: list[float] | None = None  # one for each expert, of its pruned change; null for ones

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("rescale", self.rescale, ("none", "share", "l1"))


def magnitude_prune(base: torch.Tensor, experts: torch.Tensor, params: MagnitudePruneParams) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32.

    Raises:
        ValueError: There are not as many weights as experts.
    """
    weights = per_expert("weights", params.weights or 1.0, len(experts))
    total = torch.zeros_like(base)
    for expert, weight in zip(experts, weights, strict=True):
        if params.of == "change":
            total += _kept(expert - base, params).mul_(weight)
        else:
            total += _kept(expert, params).sub_(base).mul_(weight)
    return total.mul_(params.scale).add_(base)


def _kept(values: torch.Tensor, params: MagnitudePruneParams) -> torch.Tensor:
    """What is left of a change or of weights, (*shape), rescaled."""
    pruned = values.flatten() if params.scope == "tensor" else values
    kept = keep_in_rows(pruned, params.density, params.prune == "minor").reshape(values.shape)
    if params.rescale == "share":
        n = rows_of(pruned).shape[1]
        kept *= n / count_kept(params.density, n)
    elif params.rescale == "l1":
        kept *= float(l1_factors([(norms(values[None]), norms(kept[None]))]))
    return kept
