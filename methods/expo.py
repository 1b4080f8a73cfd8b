"""ExPO: beyond the aligned model, on along the line from the base (its SFT model) to the experts' mean.

Source: Zheng et al. 2024, arXiv:2404.16792 (weak-to-strong extrapolation).
Differs: `scale` is 1 + alpha of the paper, so that here as everywhere 0 is the base and 1 the experts' mean. Several
experts are averaged first, and `density` extrapolates the largest entries of a tensor's change only, as FusionBench
does; its other options are schedules of `scale` (conf/experiment/expo_decoder.yaml), and with DARE first it is the
method `dare` with scale (1 + alpha) / T.
Formula: merged = base + scale * (mean_i expert_i - base)
Cost: O(T n) time, 2 T + 3 chunks of memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from methods.kinds import Pieces
from methods.lazy import torch
from methods.parameters import Params, share, tunable
from methods.primitives import average, keep_above
from methods.selection import kth_largest


@dataclass(frozen=True)
class ExpoParams(Params):
    """Parameters of `expo`; also the schema of conf/method/expo.yaml."""

    scale: float = tunable(1.1, low=1.0, high=2.0, published=(1.3, 1.5))  # multiplies the mean change; 1 + alpha
    density: float = share(1.0, low=0.1, high=1.0)  # share of each tensor's mean change that is extrapolated, (0, 1]


def thresholds(pieces: Pieces, params: ExpoParams) -> torch.Tensor | None:
    """Smallest magnitude of the mean change that is extrapolated in a tensor, (1,); None where all is."""
    if params.density == 1:
        return None

    def walk(function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Iterable[Any]:
        return pieces(lambda piece: function(average(piece.deltas)[None]), limit)

    return kth_largest(walk, params.density)


def expo(
    base: torch.Tensor, experts: torch.Tensor, params: ExpoParams, *, numbers: torch.Tensor | None
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), threshold (1,) -> (*shape), all float32."""
    change = average(experts - base)
    if numbers is None:
        return change.mul_(params.scale).add_(base)
    further = keep_above(change[None], numbers)[0].mul_(params.scale - 1)
    return further.add_(change).add_(base)
