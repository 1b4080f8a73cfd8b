"""CABS: prune task vectors one after the other to n of every m entries, none where an earlier one has kept an entry.

Source: Yang et al. 2025, arXiv:2503.01874, Algorithm 1.
Differs: any number of experts, in the pool's order, the first with the first choice. Blocks run over the flattened
tensor; of a last block of r < m entries n r / m are kept, rounded up, where the authors' code drops it whole.
Formula: merged = base + scale * sum_i w_i mask_i delta_i, mask_i the n largest of every m of |delta_i| prod_{j<i} (1 -
mask_j)
Cost: O(T n log(m)) time, T + 5 numbers for each entry of a tensor
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import Params, per_expert, tunable
from methods.primitives import keep_n_of_m


@dataclass(frozen=True)
class CabsParams(Params):
    """Parameters of `cabs`; also the schema of conf/method/cabs.yaml."""

    n: int = tunable(64, low=8, high=128, step=8)  # entries kept of every m, 1 to m
    m: int = 256  # entries of a block
    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change
    weights: list[float] | None = None  # one for each expert, of its pruned change (lambda in the paper); null for ones

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n <= self.m:
            raise ValueError(f"of every m entries n are kept, n in [1, m], got n {self.n} and m {self.m}")


def cabs(base: torch.Tensor, experts: torch.Tensor, params: CabsParams) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32.

    Raises:
        ValueError: There are not as many weights as experts.
    """
    weights = per_expert("weights", params.weights or 1.0, len(experts))
    total = torch.zeros_like(base)
    free = torch.ones_like(base)  # 1 where no expert has kept its entry
    for expert, weight in zip(experts, weights, strict=True):
        kept = keep_n_of_m((expert - base).mul_(free), params.n, params.m)
        free *= kept.eq(0)
        total += kept.mul_(weight)
    return total.mul_(params.scale).add_(base)
