"""SLERP: from one model to another along the great circle, tensor by tensor.

Source: Shoemake 1985, "Animating rotation with quaternion curves"; as used for weights by Goddard et al. 2024,
arXiv:2403.13257: un-normalised tensors are combined with the angle between their directions.
Differs: an all-zero tensor has no direction and is met by linear interpolation; other tools take a right angle.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import finite, tunable


@dataclass(frozen=True)
class SlerpParams:
    """Parameters of `slerp`; also the schema of conf/method/slerp.yaml."""

    t: float = tunable(0.5, low=0.0, high=1.0)  # 0 is the first model, 1 the second
    linear_above: float = 0.9995  # |cosine| above which the interpolation is linear

    def __post_init__(self) -> None:
        finite("t", self.t)
        if not 0 <= self.linear_above <= 1:
            raise ValueError(f"linear_above is a cosine in [0, 1], got {self.linear_above}")


def slerp(base: torch.Tensor | None, experts: torch.Tensor, params: SlerpParams) -> torch.Tensor:
    """Between two experts, (2, *shape), or from the base to the one expert, (1, *shape) -> (*shape), float32.

    Raises:
        ValueError: There is one expert and no base to start from.
    """
    if len(experts) == 2:
        first, second = experts
    elif base is not None:
        first, second = base, experts[0]
    else:
        raise ValueError("slerp goes between two models: give two experts, or a base and one expert")
    near, far = _coefficients(first.flatten().double(), second.flatten().double(), params)
    return near * first + far * second


def _coefficients(first: torch.Tensor, second: torch.Tensor, params: SlerpParams) -> tuple[float, float]:
    """What multiplies each of two flattened tensors."""
    norms = first.norm() * second.norm()
    cosine = float(first @ second / norms) if norms > 0 else 1.0
    if abs(cosine) > params.linear_above:
        return 1 - params.t, params.t
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    shares = torch.sin(torch.tensor([1 - params.t, params.t], dtype=torch.float64) * angle) / torch.sin(angle)
    return float(shares[0]), float(shares[1])
