"""SLERP: from one model to another along the great circle, tensor by tensor; more models one after the other.

Source: Shoemake 1985, "Animating rotation with quaternion curves"; as used for weights by Goddard et al. 2024,
arXiv:2403.13257: un-normalised tensors are combined with the angle between their directions.
Differs: an all-zero tensor has no direction and is met by linear interpolation; other tools take a right angle. More
than two models are folded in their order, as people chain merges of two: from what is merged so far to the next, `t`
of the way, or as far as the next one's share of the weights up to it says, w_k / (w_1 + ... + w_k).
Formula: merged = sin((1 - t) a) / sin(a) first + sin(t a) / sin(a) second, a the angle between the two
Cost: O(T^2 n) time for the angles, O(T n) for the merge, 2 T + 2 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.angles import arc, inner_products, summed
from methods.kinds import Pieces
from methods.lazy import torch
from methods.parameters import Params, per_expert, positive, tunable
from methods.primitives import add_up


@dataclass(frozen=True)
class SlerpParams(Params):
    """Parameters of `slerp`; also the schema of conf/method/slerp.yaml."""

    t: float = tunable(0.5, low=0.0, high=1.0)  # 0 is the first model, 1 the second
    linear_above: float = 0.9995  # |cosine| above which the interpolation is linear
    weights: list[float] | None = None  # one for each expert, above zero, in the place of `t`; null for `t`

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.linear_above <= 1:
            raise ValueError(f"linear_above is a cosine in [0, 1], got {self.linear_above}")
        if self.weights is not None:
            positive("weights", min(self.weights))


def coefficients(pieces: Pieces, params: SlerpParams) -> torch.Tensor:
    """What multiplies each of the models in a tensor, (T,) float64, or (2,) from the base to one expert.

    Raises:
        ValueError: There is one expert and no base to start from, or not as many weights as experts.
    """
    products = summed(pieces(lambda piece: inner_products(models(piece.base, piece.experts))))
    way = _way(len(products), params)
    found = torch.zeros(len(products), dtype=torch.float64)
    found[0] = 1.0
    for index, t in enumerate(way, start=1):
        square = (found @ products @ found) * products[index, index]
        cosine = (found @ products[index]) / square.sqrt() if square > 0 else torch.ones((), dtype=torch.float64)
        first, second = arc(cosine.clamp(-1, 1), t, params.linear_above)
        found *= first
        found[index] = second
    return found


def slerp(
    base: torch.Tensor | None, experts: torch.Tensor, params: SlerpParams, *, numbers: torch.Tensor
) -> torch.Tensor:
    """Through the experts, (T, *shape), or from the base to the one expert, (1, *shape) -> (*shape), float32."""
    if len(experts) > 1:
        return add_up(experts, numbers.tolist())
    assert base is not None, "refused before"
    return (base * float(numbers[0])).add_(experts[0] * float(numbers[1]))


def models(base: torch.Tensor | None, experts: torch.Tensor) -> torch.Tensor:
    """The experts, (T, *shape), or base and expert where there is one, (2, *shape).

    Raises:
        ValueError: There is one expert and no base to start from.
    """
    if len(experts) > 1:
        return experts
    if base is None:
        raise ValueError("it goes from one model to another: give two experts, or a base and one expert")
    return torch.stack([base, experts[0]])


def _way(n_models: int, params: SlerpParams) -> list[float]:
    """How far each step goes."""
    if params.weights is None:
        return [params.t] * (n_models - 1)
    weights = per_expert("weights", params.weights, n_models)
    return [weights[index] / sum(weights[: index + 1]) for index in range(1, n_models)]
