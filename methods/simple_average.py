"""Simple average: the mean of the experts' weights.

Source: Wortsman et al. 2022, arXiv:2203.05482 (uniform soup).
Differs: nothing.
Formula: merged = 1/T sum_i expert_i
Cost: O(T n) time, T + 1 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.primitives import average


@dataclass(frozen=True)
class SimpleAverageParams:
    """`simple_average` has no parameters."""


def simple_average(base: torch.Tensor | None, experts: torch.Tensor, params: SimpleAverageParams) -> torch.Tensor:
    """Mean over experts, (T, *shape) -> (*shape), float32."""
    return average(experts)
