"""NuSLERP: between two experts along the great circle, by weights; where there is a base, between their task vectors.

Source: none; mergekit 0.1.5 (`nuslerp`), after Shoemake 1985.
Differs: weights that sum to zero are refused, mergekit takes the middle. Vectors whose directions are closer than a
cosine of 1 - 1e-6, or as nearly opposite, are interpolated linearly. A zero vector is at a right angle, as there.
Formula: merged = base + sin((1 - t) a) / sin(a) delta_1 + sin(t a) / sin(a) delta_2, t = w_2 / (w_1 + w_2)
Cost: O(n) time, 5 n numbers
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.angles import arc, cosines, inner_products, row_products
from methods.lazy import torch
from methods.parameters import Params, one_of, per_expert


@dataclass(frozen=True)
class NuslerpParams(Params):
    """Parameters of `nuslerp`; also the schema of conf/method/nuslerp.yaml."""

    weights: list[float] | None = None  # of both experts: the second's share is how far to go; null for half the way
    along: str = "tensor"  # what has an angle: the whole tensor, each vector along its `last` axis, or its `first`

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("along", self.along, ("tensor", "last", "first"))
        if self.weights is not None and abs(sum(self.weights)) < 1e-6:
            raise ValueError(f"weights must not sum to zero, got {list(self.weights)}")


def nuslerp(base: torch.Tensor | None, experts: torch.Tensor, params: NuslerpParams) -> torch.Tensor:
    """Merge one tensor: base (*shape) or None, experts (2, *shape) -> (*shape), float32.

    Raises:
        ValueError: There are not two weights.
    """
    weights = per_expert("weights", params.weights or 1.0, 2)
    deltas = experts if base is None else experts - base
    turned = params.along == "first" and deltas.dim() > 2
    laid = deltas.transpose(1, -1) if turned else deltas  # what has an angle lies along the last axis
    if params.along == "tensor" or deltas.dim() < 3:
        cosine = cosines(inner_products(laid))[0, 1]
    else:
        cosine = cosines(row_products(laid.flatten(1, -2)))[:, 0, 1].reshape(*laid.shape[1:-1], 1)
    first, second = arc(cosine, weights[1] / sum(weights))
    merged = (laid[0] * first.to(laid)).add_(laid[1] * second.to(laid))
    if turned:
        merged = merged.transpose(0, -1).contiguous()
    return merged if base is None else merged.add_(base)
