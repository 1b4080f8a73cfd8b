"""TATR: task arithmetic on the entries where no task's change is feared by the loss of another.

Source: Sun et al. 2025, arXiv:2501.15065: the sensitivity Omega sums, over pairs of tasks, the mean magnitude of one's
gradient at the base times the magnitude of the other's change; entries below its quantile are the trust region.
`trust_region_zero_shot` is the paper's variant without data: a task's own change stands for its gradient.
Differs: entries without any conflict (Omega is zero) are always kept, so that one expert, or experts that change
different entries, are not trimmed by a tie; FusionBench drops them, and measures gradients in training mode.
Formula: merged = base + scale * sum_j delta_j [Omega < quantile], Omega = sum_i sum_{j != i} E|grad L_i| |delta_j|
Cost: O(T n) time, T + 5 chunks of memory besides the T n gradients; these take a backward pass for each example
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from methods.kinds import Piece, Pieces
from methods.lazy import torch
from methods.parameters import Params, share, tunable, word
from methods.primitives import changes
from methods.selection import kth_largest


@dataclass(frozen=True)
class TrustRegionParams(Params):
    """Parameters of `trust_region`; also the schema of conf/method/trust_region.yaml."""

    scale: float = tunable(0.3, low=0.0, high=1.5)  # multiplies the sum of task vectors (lambda)
    density: float = share(0.99, low=0.5, high=1.0, published=(0.95, 0.9))  # share kept, in (0, 1]
    scope: str = word("model", "tensor")  # the quantile is that of the model, or of each tensor


@dataclass(frozen=True)
class TrustRegionZeroShotParams(TrustRegionParams):
    """Parameters of `trust_region_zero_shot`; also the schema of conf/method/trust_region_zero_shot.yaml."""


def threshold(pieces: Pieces, params: TrustRegionParams) -> float:
    """The sensitivity from which on an entry is dropped; infinite where the density drops none.

    Raises:
        ValueError: A tensor has no gradients.
    """
    return _quantile(pieces, params.density, lambda piece: sensitivity(piece.deltas, _gradients(piece)))


def threshold_zero_shot(pieces: Pieces, params: TrustRegionParams) -> float:
    """The same with the changes themselves for gradients."""

    def omega(piece: Piece) -> torch.Tensor:
        deltas = piece.deltas
        return sensitivity(deltas, deltas.abs())

    return _quantile(pieces, params.density, omega)


def prepared(params: TrustRegionParams) -> tuple[str, ...]:
    """What `threshold` reads once for the whole model, and so cannot differ from tensor to tensor."""
    return ("density",) if params.scope == "model" else ()


def trust_region(
    base: torch.Tensor, experts: torch.Tensor, params: TrustRegionParams, *, numbers: float, stats: torch.Tensor
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts and mean magnitudes of gradients `stats` (T, *shape) -> (*shape).

    Raises:
        ValueError: The gradients have another shape, or negative entries.
    """
    if stats.shape != experts.shape:
        raise ValueError(f"gradients are shaped like the weights {experts.shape[1:]}, got {stats.shape[1:]}")
    if (stats < 0).any():
        raise ValueError(f"magnitudes of gradients cannot be negative, got {float(stats.min())}")
    return _within(base, experts, params.scale, sensitivity(experts - base, stats), numbers)


def trust_region_zero_shot(
    base: torch.Tensor, experts: torch.Tensor, params: TrustRegionParams, *, numbers: float
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape)."""
    deltas = experts - base
    return _within(base, experts, params.scale, sensitivity(deltas, deltas.abs()), numbers)


def sensitivity(deltas: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Each task's gradients times the others' changes, in magnitude, summed: (T, *shape) twice -> (*shape).

    >>> sensitivity(torch.tensor([[1.0], [-2.0]]), torch.tensor([[10.0], [100.0]]))  # 10 * 2 + 100 * 1
    tensor([120.])
    """
    total, seen, moved = (torch.zeros_like(deltas[0]) for _ in range(3))
    for delta, gradient in zip(deltas, gradients, strict=True):
        size = delta.abs()
        total.addcmul_(seen, size).addcmul_(moved, gradient)  # earlier gradients by this change, and the reverse
        seen += gradient
        moved += size
    return total


def _within(
    base: torch.Tensor, experts: torch.Tensor, scale: float, omega: torch.Tensor, numbers: float
) -> torch.Tensor:
    trusted = omega.lt(numbers).logical_or_(omega.eq(0))
    return changes(base, experts).mul_(scale).mul_(trusted).add_(base)


def _gradients(piece: Piece) -> torch.Tensor:
    if piece.stats is None:
        raise ValueError(f"trust_region needs gradients for every tensor, and {piece.name} has none")
    return piece.stats


def _quantile(pieces: Pieces, density: float, omega_of: Any) -> float:
    """The least sensitivity of the share 1 - density, rounded down, that is most sensitive."""
    sizes: list[int] = []

    def walk(function: Any, limit: int | None = None) -> Iterable[Any]:
        def look(piece: Piece) -> tuple[int, Any]:
            omega = omega_of(piece)
            return omega.numel(), function(omega[None])

        sizes.clear()
        for size, found in pieces(look, limit):
            sizes.append(size)
            yield found

    if density == 1:
        return float("inf")
    found = float(kth_largest(walk, 1 - density)[0])
    return found if int((1 - density) * sum(sizes) + 1e-6) else float("inf")
