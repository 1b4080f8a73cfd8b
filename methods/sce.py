"""SCE: select entries that differ most among experts, weigh experts by their energy there, erase minority signs.

Source: Wan et al. 2024, arXiv:2408.07990, section 3.3 (select, calculate, erase), tensor by tensor.
Differs: what is left is divided by the weights that are left, as the authors' code in mergekit. Where mergekit takes
equal weights for energies below 1e-6, weights are in proportion to the energy however small. At least one entry is
selected of a tensor, all of one on which the experts agree exactly; mergekit leaves those at the base. An exactly zero
vote merges nothing.
Formula: merged = base + scale * sum_i w_i delta_ij / sum_i w_i over selected delta_ij with the elected sign, w_i =
|selected delta_i|^2
Cost: O(T n) time four times (variances, weights, then the merge), T + 6 chunks of memory
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from methods.kinds import Piece, Pieces
from methods.lazy import torch
from methods.parameters import Params, share, tunable
from methods.primitives import add_up, average, summed
from methods.selection import count_kept, kth_largest


@dataclass(frozen=True)
class SceParams(Params):
    """Parameters of `sce`; also the schema of conf/method/sce.yaml."""

    density: float = share(0.1, low=0.05, high=1.0)  # share selected of the entries that differ, in (0, 1]
    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change


def selection(pieces: Pieces, params: SceParams) -> torch.Tensor:
    """Smallest variance that is selected in a tensor and each expert's weight there, (1 + T,) float64."""
    threshold = 0.0
    if params.density < 1:
        n_differing = sum(pieces(lambda piece: int(_variance(piece.deltas).count_nonzero())))

        def walk(function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Iterable[Any]:
            return pieces(lambda piece: function(_variance(piece.deltas)[None]), limit)

        if n_differing:
            n_kept = count_kept(params.density, n_differing)
            threshold = float(kth_largest(walk, params.density, lambda share, n: n_kept))

    def energies(piece: Piece) -> list[float]:
        return [summed(delta.double().square_()) for delta in _selected(piece.deltas, threshold)]

    totals = [math.fsum(own) for own in zip(*pieces(energies), strict=True)]
    whole = math.fsum(totals) or 1.0
    return torch.tensor([threshold, *(total / whole for total in totals)], dtype=torch.float64)


def sce(base: torch.Tensor, experts: torch.Tensor, params: SceParams, *, numbers: torch.Tensor) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), `selection` -> (*shape), all float32."""
    threshold, *weights = numbers.tolist()
    deltas = _selected(experts - base, threshold)
    elected = add_up(deltas).sign_()
    total, left = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight in zip(deltas, weights, strict=True):
        agreed = delta.mul_(elected).relu_()
        total += agreed * weight
        left += agreed.sign_().mul_(weight)
    return total.mul_(elected).div_(left.add_(left.eq(0))).mul_(params.scale).add_(base)


def _variance(deltas: torch.Tensor) -> torch.Tensor:
    """Of each entry over the experts, (T, *shape) -> (*shape)."""
    mean = average(deltas)
    total = torch.zeros_like(mean)
    for delta in deltas:
        total += (delta - mean).square_()
    return total.div_(len(deltas))


def _selected(deltas: torch.Tensor, threshold: float) -> torch.Tensor:
    """Zero the entries whose variance is below the threshold, (T, *shape); everything is kept by a threshold of 0."""
    if threshold == 0:
        return deltas
    return deltas * _variance(deltas).ge(threshold)
