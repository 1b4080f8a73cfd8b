"""Multi-SLERP: the mean of the experts' directions, as long as they are on average; from the base where there is one.

Source: none; mergekit 0.1.5 (`multislerp`): weighted barycentre on the sphere, by way of the tangent space at the
normalised weighted mean.
Differs: nothing in the result. The weighted mean of the tangents is zero where they touch at that very mean, so the way
there and back leaves it as it is, and is not gone. Directions that cancel out (a mean shorter than 1e-3) have none:
there the weighted sum of the tensors is taken, where mergekit stops for more than two.
Formula: merged = base + (sum_i w_i ||delta_i||) m / ||m||, m = sum_i w_i delta_i / ||delta_i||
Cost: O(T^2 n) time for the angles, O(T n) for the merge, T + 3 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.angles import inner_products, summed
from methods.kinds import Pieces
from methods.lazy import torch
from methods.parameters import Params, per_expert
from methods.primitives import add_up, changes

_CANCELLED = 1e-3  # length of the mean of unit vectors that is taken for none


@dataclass(frozen=True)
class MultislerpParams(Params):
    """Parameters of `multislerp`; also the schema of conf/method/multislerp.yaml."""

    weights: list[float] | None = None  # one for each expert; null for equal ones
    normalize: bool = True  # divide them by their sum

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and self.normalize and abs(sum(self.weights)) < 1e-8:
            raise ValueError(f"weights that are normalised must not sum to zero, got {list(self.weights)}")


def coefficients(pieces: Pieces, params: MultislerpParams) -> list[float]:
    """What multiplies each expert, or its task vector, in a tensor, T of them.

    Raises:
        ValueError: There are not as many weights as experts.
    """
    products = summed(pieces(lambda piece: inner_products(piece.experts, piece.base)))
    weights = torch.tensor(per_expert("weights", params.weights or 1.0, len(products)), dtype=torch.float64)
    if params.normalize or params.weights is None:
        weights /= weights.sum()
    return to_mean_norm(weights, products).tolist()


def to_mean_norm(weights: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Coefficients of the weighted mean direction times the weighted mean norm; the weights where it is zero, (T,)."""
    norms = products.diagonal().sqrt()
    found = (weights / norms).where(norms > 0, torch.zeros_like(weights))
    length = (found @ products @ found).clamp(min=0).sqrt()
    return weights if length < _CANCELLED else found * ((weights @ norms) / length)


def multislerp(
    base: torch.Tensor | None, experts: torch.Tensor, params: MultislerpParams, *, numbers: list[float]
) -> torch.Tensor:
    """Merge one tensor: base (*shape) or None, experts (T, *shape), coefficients -> (*shape), float32."""
    return add_up(experts, numbers) if base is None else changes(base, experts, numbers).add_(base)
