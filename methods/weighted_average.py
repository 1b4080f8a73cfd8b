"""Weighted average: the experts' weights summed, each times its own number.

Source: Wortsman et al. 2022, arXiv:2203.05482 (the soup with weights given).
Differs: nothing; `normalize` divides by the plain sum of the numbers, negative ones included, as other tools do.
Formula: merged = sum_i w_i expert_i, divided by sum_i w_i where `normalize`
Cost: O(T n) time, T + 2 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import Params, per_expert
from methods.primitives import add_up, average


@dataclass(frozen=True)
class WeightedAverageParams(Params):
    """Parameters of `weighted_average`; also the schema of conf/method/weighted_average.yaml."""

    weights: list[float] | None = None  # one for each expert, in the pool's order; null for equal ones
    normalize: bool = True  # divide by their sum

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and self.normalize and abs(sum(self.weights)) < 1e-8:
            raise ValueError(f"weights that are normalised must not sum to zero, got {list(self.weights)}")


def weighted_average(base: torch.Tensor | None, experts: torch.Tensor, params: WeightedAverageParams) -> torch.Tensor:
    """Weighted sum over experts, (T, *shape) -> (*shape), float32.

    Raises:
        ValueError: There are not as many weights as experts.
    """
    if params.weights is None:
        return average(experts)
    weights = per_expert("weights", params.weights, len(experts))
    merged = add_up(experts, weights)
    return merged.div_(sum(weights)) if params.normalize else merged
