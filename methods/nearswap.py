"""NearSwap: every weight moves towards the other model by `t` at most, and reaches it where the two are that near.

Source: none; mergekit 0.1.5 (`nearswap`), from the model card of QuartetAnemoi-70B.
Differs: nothing but that a `t` below 1e-6 counts as it is.
Formula: merged = base + clamp(expert - base, -t, t)
Cost: O(n) time, 3 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import at_least, tunable


@dataclass(frozen=True)
class NearswapParams:
    """Parameters of `nearswap`; also the schema of conf/method/nearswap.yaml."""

    t: float = tunable(1e-4, low=1e-5, high=1e-2, log=True)  # how far a weight moves at most, in its own units

    def __post_init__(self) -> None:
        at_least("t", self.t, 0)


def nearswap(base: torch.Tensor, experts: torch.Tensor, params: NearswapParams) -> torch.Tensor:
    """Merge one tensor: base (*shape), the one expert (1, *shape) -> (*shape), all float32."""
    return (experts[0] - base).clamp_(-params.t, params.t).add_(base)
