"""Reinforced agent merging: what one expert alone has changed is kept whole, what several have changed is averaged.

Source: Yuan et al. 2026, arXiv:2601.13572; RAM+ multiplies what is an expert's own by 1 + r min(shared / own, alpha).
Differs: ramplus_tl counts shared and own entries in each tensor, as mergekit; scope=model counts them in the whole
model, as the paper. An expert that has no entry of its own has none to multiply.
Formula: merged = base + scale * sum_i [|delta_i| > epsilon] f_i delta_i / (number of experts with |delta_i| > epsilon)
Cost: O(T n) time, T + 4 chunks of memory; ramplus_tl twice (counts, then the merge)
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Piece, Pieces
from methods.lazy import torch
from methods.parameters import Params, at_least, tunable, word


@dataclass(frozen=True)
class RamParams(Params):
    """Parameters of `ram`; also the schema of conf/method/ram.yaml."""

    epsilon: float = tunable(1e-5, low=1e-7, high=1e-3, log=True)  # a change this small is none, at least 0
    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("epsilon", self.epsilon, 0)


@dataclass(frozen=True)
class RamplusTlParams(RamParams):
    """Parameters of `ramplus_tl`; also the schema of conf/method/ramplus_tl.yaml."""

    r: float = tunable(0.1, low=0.0, high=1.0)  # how strongly an expert's own entries are enlarged, at least 0
    alpha: float = tunable(0.2, low=0.0, high=1.0)  # most that shared / own may count, at least 0
    scope: str = word("tensor", "model")  # count shared and own entries in each tensor, or in the whole model

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 0)
        at_least("alpha", self.alpha, 0)


def prepared(params: RamplusTlParams) -> tuple[str, ...]:
    """What `factors` reads once for the whole model, and so cannot differ from tensor to tensor."""
    return ("epsilon", "r", "alpha") if params.scope == "model" else ()


def factors(pieces: Pieces, params: RamplusTlParams) -> torch.Tensor:
    """What multiplies each expert's own entries, (T,) float32."""

    def counts(piece: Piece) -> torch.Tensor:
        changed = torch.stack([_changed(delta, params.epsilon) for delta in piece.deltas]).flatten(1)
        alone = _alone(changed.sum(0))
        return torch.stack([changed.count_nonzero(1), changed.mul_(alone).count_nonzero(1)])

    total, own = torch.stack(list(pieces(counts))).sum(0)
    return 1 + params.r * ((total - own) / own.clamp(min=1)).clamp(max=params.alpha)


def ram(base: torch.Tensor, experts: torch.Tensor, params: RamParams) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32."""
    return _merged(base, experts, params)


def ramplus_tl(
    base: torch.Tensor, experts: torch.Tensor, params: RamplusTlParams, *, numbers: torch.Tensor
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), factors (T,) -> (*shape), all float32."""
    return _merged(base, experts, params, numbers.tolist())


def _merged(
    base: torch.Tensor, experts: torch.Tensor, params: RamParams, factors: list[float] | None = None
) -> torch.Tensor:
    total, count = torch.zeros_like(base), torch.zeros_like(base)
    extra = torch.zeros_like(base)  # what is added to an entry that is one expert's own, as a share of it
    for index, expert in enumerate(experts):
        delta = expert - base
        changed = _changed(delta, params.epsilon)
        if factors is not None:
            extra += changed * (factors[index] - 1)
        count += changed
        total += delta.mul_(changed)
    if factors is not None:
        total *= extra.mul_(_alone(count)).add_(1)
    return total.div_(count.clamp_(min=1)).mul_(params.scale).add_(base)


def _changed(delta: torch.Tensor, epsilon: float) -> torch.Tensor:
    """1.0 where the magnitude is above epsilon."""
    return delta.abs().sub_(epsilon).sign_().relu_()


def _alone(count: torch.Tensor) -> torch.Tensor:
    """1.0 where one expert counts."""
    return count.eq(1).to(count.dtype)
