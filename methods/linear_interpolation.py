"""Linear interpolation: from one model to another on the straight line.

Source: Wortsman et al. 2022, arXiv:2109.01903 (WiSE-FT, from the base to its fine-tune).
Differs: nothing; with one expert the line starts at the base, with two at the first expert.
Formula: merged = (1 - t) first + t second
Cost: O(n) time, 4 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import Params, tunable
from methods.slerp import models


@dataclass(frozen=True)
class LinearInterpolationParams(Params):
    """Parameters of `linear_interpolation`; also the schema of conf/method/linear_interpolation.yaml."""

    t: float = tunable(0.5, low=0.0, high=1.0)  # 0 is the first model, 1 the second; beyond them it extrapolates


def linear_interpolation(
    base: torch.Tensor | None, experts: torch.Tensor, params: LinearInterpolationParams
) -> torch.Tensor:
    """Between two experts, (2, *shape), or from the base to the one expert, (1, *shape) -> (*shape), float32.

    Raises:
        ValueError: There is one expert and no base to start from.
    """
    first, second = models(base, experts)
    return (first * (1 - params.t)).add_(second * params.t)
