"""Passthrough: one expert's weights as they are, or times a number; stacked layers (slices) are merged with it.

Source: none; the name is mergekit's, where it makes "frankenmerges" of layers of several models.
Differs: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import finite, tunable


@dataclass(frozen=True)
class PassthroughParams:
    """Parameters of `passthrough`; also the schema of conf/method/passthrough.yaml."""

    scale: float = tunable(1.0, low=0.0, high=2.0)  # multiplies the weights

    def __post_init__(self) -> None:
        finite("scale", self.scale)


def passthrough(base: torch.Tensor | None, experts: torch.Tensor, params: PassthroughParams) -> torch.Tensor:
    """The one expert's tensor, (1, *shape) -> (*shape), float32."""
    return params.scale * experts[0]
