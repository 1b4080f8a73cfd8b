"""SLERP: from one model to another along the great circle, tensor by tensor.

Source: Shoemake 1985, "Animating rotation with quaternion curves"; as used for weights by Goddard et al. 2024,
arXiv:2403.13257: un-normalised tensors are combined with the angle between their directions.
Differs: an all-zero tensor has no direction and is met by linear interpolation; other tools take a right angle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from methods.kinds import Piece, Pieces
from methods.lazy import torch
from methods.parameters import finite, tunable

_BLOCK = 4096  # numbers summed together


@dataclass(frozen=True)
class SlerpParams:
    """Parameters of `slerp`; also the schema of conf/method/slerp.yaml."""

    t: float = tunable(0.5, low=0.0, high=1.0)  # 0 is the first model, 1 the second
    linear_above: float = 0.9995  # |cosine| above which the interpolation is linear

    def __post_init__(self) -> None:
        finite("t", self.t)
        if not 0 <= self.linear_above <= 1:
            raise ValueError(f"linear_above is a cosine in [0, 1], got {self.linear_above}")


def coefficients(pieces: Pieces, params: SlerpParams) -> torch.Tensor:
    """What multiplies each of the two models in a tensor, (2,) float64.

    Raises:
        ValueError: There is one expert and no base to start from.
    """
    found = list(pieces(_products))
    inner, first, second = (math.fsum(part[index] for part in found) for index in range(3))
    norms = math.sqrt(first) * math.sqrt(second)
    cosine = min(max(inner / norms, -1.0), 1.0) if norms > 0 else 1.0
    if abs(cosine) > params.linear_above:
        return torch.tensor([1 - params.t, params.t], dtype=torch.float64)
    angle = math.acos(cosine)
    shares = [math.sin((1 - params.t) * angle), math.sin(params.t * angle)]
    return torch.tensor(shares, dtype=torch.float64) / math.sin(angle)


def slerp(
    base: torch.Tensor | None, experts: torch.Tensor, params: SlerpParams, *, numbers: torch.Tensor
) -> torch.Tensor:
    """Between two experts, (2, *shape), or from the base to the one expert, (1, *shape) -> (*shape), float32."""
    first, second = _pair(base, experts)
    return (first * float(numbers[0])).add_(second * float(numbers[1]))


def _pair(base: torch.Tensor | None, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if len(experts) == 2:
        return experts[0], experts[1]
    if base is None:
        raise ValueError("slerp goes between two models: give two experts, or a base and one expert")
    return base, experts[0]


def _products(piece: Piece) -> list[float]:
    """Inner product and squared norms of the two models in a piece, summed in float64, block by block."""
    first, second = (tensor.flatten().double() for tensor in _pair(piece.base, piece.experts))
    return [_summed(left * right) for left, right in ((first, second), (first, first), (second, second))]


def _summed(values: torch.Tensor) -> float:
    """The sum of blocks' sums, so that threads, which share blocks out, change no bit of it."""
    whole = len(values) // _BLOCK * _BLOCK
    sums = values[:whole].view(-1, _BLOCK).sum(1).tolist()
    return math.fsum([*sums, float(values[whole:].sum())])
