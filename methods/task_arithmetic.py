"""Task arithmetic: the base plus the scaled sum of the task vectors.

Source: Ilharco et al. 2023, arXiv:2212.04089, section 4.
Differs: nothing; `weights` gives each task vector its own coefficient, which is what AdaMerging and studies search.
Formula: merged = base + scale * sum_i w_i (expert_i - base)
Cost: O(T n) time, T + 3 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import Params, per_expert, tunable
from methods.primitives import changes


@dataclass(frozen=True)
class TaskArithmeticParams(Params):
    """Parameters of `task_arithmetic`; also the schema of conf/method/task_arithmetic.yaml."""

    scale: float = tunable(0.3, low=0.0, high=1.5, published=(0.4,))  # multiplies the sum of task vectors (lambda)
    weights: list[float] | None = None  # one coefficient for each expert, times scale; null for ones


def task_arithmetic(base: torch.Tensor, experts: torch.Tensor, params: TaskArithmeticParams) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32.

    Raises:
        ValueError: There are not as many weights as experts.
    """
    weights = per_expert("weights", params.weights, len(experts)) if params.weights else None
    return changes(base, experts, weights).mul_(params.scale).add_(base)
