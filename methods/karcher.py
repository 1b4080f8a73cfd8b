"""Karcher mean: the point of the sphere whose arcs to the experts' directions balance, as long as they are on average.

Source: Karcher 1977, "Riemannian center of mass and mollifier smoothing"; for weights mergekit 0.1.5 (`karcher`).
Differs: `weights` may differ, mergekit's are equal. Directions that cancel out have no mean: there the weighted sum of
the tensors is taken, where mergekit starts at the first. A direction opposite to the point reached takes no part in
that step; an all-zero tensor takes none but in the length.
Formula: u <- exp_u(sum_i w_i log_u(expert_i / ||expert_i||)) until it stands; merged = (sum_i w_i ||expert_i||) u
Cost: O(T^2 n) time for the angles, O(T n) for the merge, 2 T + 1 chunks of memory
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from methods.angles import inner_products, summed
from methods.kinds import Pieces
from methods.lazy import torch
from methods.multislerp import to_mean_norm
from methods.parameters import Params, at_least, per_expert, positive
from methods.primitives import add_up


@dataclass(frozen=True)
class KarcherParams(Params):
    """Parameters of `karcher`; also the schema of conf/method/karcher.yaml."""

    weights: list[float] | None = None  # one for each expert, above zero; null for equal ones
    steps: int = 10  # at most
    tolerance: float = 1e-5  # angle in radians below which it stops

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("steps", self.steps, 0)
        positive("tolerance", self.tolerance)
        if self.weights is not None:
            positive("weights", min(self.weights))


def coefficients(pieces: Pieces, params: KarcherParams) -> list[float]:
    """What multiplies each expert in a tensor, T of them.

    Raises:
        ValueError: There are not as many weights as experts.
    """
    products = summed(pieces(lambda piece: inner_products(piece.experts)))
    weights = torch.tensor(per_expert("weights", params.weights or 1.0, len(products)), dtype=torch.float64)
    weights /= weights.sum()
    norms = products.diagonal().sqrt()
    start = to_mean_norm(weights, products)
    length = (start @ products @ start).clamp(min=0).sqrt()
    if start is weights or length == 0:
        return weights.tolist()
    point = start / length
    for _ in range(params.steps):
        step = _towards(point, weights, norms, products, params.tolerance)
        angle = float((step @ products @ step).clamp(min=0).sqrt())
        if angle < params.tolerance:
            break
        point = math.cos(angle) * point + math.sin(angle) / angle * step
        point = point / (point @ products @ point).sqrt()
    return (point * (weights @ norms)).tolist()


def _towards(
    point: torch.Tensor, weights: torch.Tensor, norms: torch.Tensor, products: torch.Tensor, tolerance: float
) -> torch.Tensor:
    """Weighted mean of the tangents at a point towards all directions, as coefficients of the experts, (T,)."""
    step = torch.zeros_like(point)
    taking_part = weights[norms > 0].sum()
    for index in torch.nonzero(norms).flatten().tolist():
        cosine = float((point @ products[index] / norms[index]).clamp(-1, 1))
        angle = math.acos(cosine)
        if tolerance <= angle < math.pi - 1e-3:
            factor = float(weights[index] / taking_part) * angle / math.sin(angle)
            step -= factor * cosine * point
            step[index] += factor / norms[index]
    return step


def karcher(
    base: torch.Tensor | None, experts: torch.Tensor, params: KarcherParams, *, numbers: list[float]
) -> torch.Tensor:
    """Merge one tensor: experts (T, *shape), coefficients -> (*shape), float32."""
    return add_up(experts, numbers)
