"""MagMax: for each weight the one change that is largest in magnitude.

Source: Marczak et al. 2024, arXiv:2407.06322.
Differs: of two changes that are exactly opposite the positive one is taken, whoever's it is, where FusionBench takes
the later expert's.
Formula: merged = base + scale * delta_kj, k = argmax_i |delta_ij|, for each entry j
Cost: O(T n) time, T + 5 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import Params, tunable


@dataclass(frozen=True)
class MagmaxParams(Params):
    """Parameters of `magmax`; also the schema of conf/method/magmax.yaml."""

    scale: float = tunable(0.5, low=0.0, high=1.5, published=(0.6,))  # multiplies the chosen changes


def magmax(base: torch.Tensor, experts: torch.Tensor, params: MagmaxParams) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32."""
    highest, lowest = experts[0].clone(), experts[0].clone()
    for expert in experts[1:]:
        torch.maximum(highest, expert, out=highest)
        torch.minimum(lowest, expert, out=lowest)
    highest -= base  # the largest change: rounding keeps the order
    lowest -= base
    chosen = torch.where(highest >= -lowest, highest, lowest)
    return chosen.mul_(params.scale).add_(base)
