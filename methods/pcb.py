"""PCB-Merging: entries compete by their size in their task and their agreement with all tasks; winners are averaged.

Source: Du et al. 2024, arXiv:2410.02396, section 3, with what the text leaves open as in the authors' code.
Differs: an entry is scored exp(T s^2) tanh(delta sum), s its clipped magnitude from 0 to 1 in its task and sum that of
all tasks' changes: the authors' code, where the paper writes softmax for both. One that goes against the others never
wins, whatever the density. scope=tensor lets each tensor's entries compete on their own.
Formula: merged = base + scale * sum_i w_i f_ij clip(delta_ij) / sum_i f_ij, f_ij from 0 at the last score that is kept
to 1 at the highest
Cost: O(T n) time five times (two clips, scores, their highest, then the merge), 4 T + 4 chunks of memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from methods.kinds import Pieces
from methods.lazy import torch
from methods.parameters import Params, per_expert, share, tunable, word
from methods.primitives import add_up
from methods.selection import kth_largest


@dataclass(frozen=True)
class PcbParams(Params):
    """Parameters of `pcb`; also the schema of conf/method/pcb.yaml."""

    density: float = share(0.1, low=0.05, high=0.3, published=(0.05, 0.2))  # share of entries that win, in (0, 1]
    scale: float = tunable(1.2, low=0.1, high=2.0)  # multiplies the merged change (lambda)
    clip: float = 0.0001  # share of magnitudes that is clipped at either end, in [0, 0.5)
    scope: str = word("model", "tensor")  # compete over all weights at once, or in each tensor
    weights: list[float] | None = None  # one for each expert, of its change; null for ones

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.clip < 0.5:
            raise ValueError(f"clip is a share in [0, 0.5), got {self.clip}")


def prepared(params: PcbParams) -> tuple[str, ...]:
    """What `ranges` reads once for the whole model, and so cannot differ from tensor to tensor."""
    return ("density", "clip") if params.scope == "model" else ()


def ranges(pieces: Pieces, params: PcbParams) -> torch.Tensor:
    """Bounds of each expert's magnitudes, the last score that wins and the highest, (4, T) float32."""

    def outliers(n: int) -> int:
        return int(params.clip * n)

    def walk(function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Iterable[Any]:
        return pieces(lambda piece: function(piece.deltas), limit)

    highs = kth_largest(walk, max(params.clip, 1e-9), lambda share, n: outliers(n) + 1)
    lows = kth_largest(walk, 1 - params.clip, lambda share, n: n - outliers(n))

    def scored(function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Iterable[Any]:
        return walk(lambda deltas: function(_scores(deltas, lows, highs)), limit)

    lasts = kth_largest(scored, params.density)
    highest = torch.stack(list(scored(_highest))).amax(0)
    return torch.stack([lows, highs, lasts, highest.to(lasts)])


def pcb(base: torch.Tensor, experts: torch.Tensor, params: PcbParams, *, numbers: torch.Tensor) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), `ranges` -> (*shape), all float32.

    Raises:
        ValueError: There are not as many weights as experts.
    """
    weights = per_expert("weights", params.weights or 1.0, len(experts))
    deltas = experts - base
    lows, highs, lasts, highest = numbers
    shares = _scores(deltas, lows, highs)
    bounds = zip(lasts.tolist(), highest.tolist(), lows.tolist(), highs.tolist(), strict=True)
    for part, delta, (last, most, low, high) in zip(shares, deltas, bounds, strict=True):
        if most > last:
            part.sub_(last).div_(most - last).clamp_(min=0)
        else:  # all that win score the same
            part.copy_(part.ge(last).logical_and_(part > 0))
        delta.copy_(delta.abs().clamp_(low, high).mul_(delta.sign()))
    total = torch.zeros_like(base)
    for part, delta, weight in zip(shares, deltas, weights, strict=True):
        total += delta.mul_(part).mul_(weight)
    return total.div_(add_up(shares).clamp_(min=1e-12)).mul_(params.scale).add_(base)


def _scores(deltas: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
    """How well each entry does, (T, *shape), at least 0."""
    together = add_up(deltas)
    scores = torch.empty_like(deltas)
    for delta, low, high, out in zip(deltas, lows.tolist(), highs.tolist(), scores, strict=True):
        size = delta.abs().clamp_(low, high).sub_(low)
        if high > low:
            size.div_(high - low)
        torch.exp(size.square_().mul_(len(deltas)), out=out)
        out.mul_((delta * together).relu_().tanh_())
    return scores


def _highest(scores: torch.Tensor) -> torch.Tensor:
    """Of each expert in a piece, (T,)."""
    flat = scores.flatten(1)
    return flat.amax(1) if flat.shape[1] else flat.new_zeros(len(flat))
