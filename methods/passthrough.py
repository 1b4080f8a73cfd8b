"""Passthrough: one expert's weights as they are, or times a number; stacked layers (slices) are merged with it.

Source: none; the name is mergekit's, where it makes "frankenmerges" of layers of several models.
Differs: nothing.
Formula: merged = scale * expert
Cost: O(n) time, 2 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import Params, tunable


@dataclass(frozen=True)
class PassthroughParams(Params):
    """Parameters of `passthrough`; also the schema of conf/method/passthrough.yaml."""

    scale: float = tunable(1.0, low=0.0, high=2.0)  # multiplies the weights


def passthrough(base: torch.Tensor | None, experts: torch.Tensor, params: PassthroughParams) -> torch.Tensor:
    """The one expert's tensor, (1, *shape) -> (*shape), float32."""
    return params.scale * experts[0]
