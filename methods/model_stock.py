"""Model Stock: the point between the base and the experts' mean that lies closest to their centre, from their angles.

Source: Jang et al. 2024, arXiv:2403.19522 (interpolation ratio for T models), t = T cos / (1 + (T - 1) cos).
Differs: t stays in [0, 1], which is where it lies for the acute angles of the paper; other tools go beyond the base
where the mean cosine is negative, as clamp=false does. The paper has one angle for all pairs: for more than two experts
the cosines are averaged, as mergekit does; FusionBench averages the angles. `filter_wise` takes each output filter of a
weight, its first axis, on its own; mergekit takes rows along the last axis, the same but for convolutions.
Formula: merged = t mean_i expert_i + (1 - t) base, c = mean over pairs cos(delta_i, delta_j)
Cost: O(T^2 n) time, (T + 4) n numbers
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.angles import cosines, inner_products, row_products
from methods.lazy import torch
from methods.primitives import average


@dataclass(frozen=True)
class ModelStockParams:
    """Parameters of `model_stock`; also the schema of conf/method/model_stock.yaml."""

    filter_wise: bool = False  # an angle for each output filter, (out, ...), instead of one for the whole tensor
    clamp: bool = True  # keep t in [0, 1]; false: a negative mean cosine leads away from the mean, without a bound


def model_stock(base: torch.Tensor, experts: torch.Tensor, params: ModelStockParams) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32."""
    n_experts = len(experts)
    if params.filter_wise and base.dim() > 1:
        products = row_products((experts - base).flatten(2))  # (out, T, T)
    else:
        products = inner_products(experts, base)[None]
    alike = cosines(products)
    own = alike.diagonal(dim1=-2, dim2=-1).sum(-1)
    cosine = ((alike.sum((-2, -1)) - own) / (n_experts * (n_experts - 1))).clamp(min=0 if params.clamp else -1)
    divisor = 1 + (n_experts - 1) * cosine
    t = n_experts * cosine / divisor.where(divisor.abs() > 1e-6, torch.full_like(divisor, torch.inf))  # (out,) or (1,)
    change = average(experts).sub_(base)
    return change.mul_(t.to(base).reshape(-1, *[1] * (base.dim() - 1)) if base.dim() else float(t)).add_(base)
