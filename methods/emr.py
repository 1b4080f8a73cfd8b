"""EMR: one unified change of elected signs and largest magnitudes, and for each expert a mask and a rescaler.

Source: Huang et al. 2024, arXiv:2405.17461, section 3.2 and Algorithm 1 (Elect, Mask, Rescale).
Differs: an entry whose changes sum to exactly zero has no elected sign and stays the base's, where FusionBench takes
the negative one. The rescaler is over all entries of the model, as in the paper; FusionBench adds up means of tensors.
Formula: u = sgn(sum_i delta_i) * max over i with that sign of |delta_i|; restored_t = base + scale_t * mask_t * u,
where mask_t = [delta_t * u > 0] and scale_t = sum |delta_t| / sum |mask_t * u|
Cost: O(T n) time, twice (once for the rescalers), 3 T + 4 pieces of memory; stored: n numbers and T n bits
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from methods.kinds import Piece, Pieces
from methods.lazy import torch
from methods.packing import PackingParams, from_bits, stored, to_bits
from methods.primitives import agreeing, summed


@dataclass(frozen=True)
class EmrParams(PackingParams):
    """Parameters of `emr`; also the schema of conf/method/emr.yaml."""


def rescalers(pieces: Pieces, params: EmrParams) -> torch.Tensor:
    """What multiplies each expert's masked unified change, (T,) float32; 1 for one whose mask is empty."""
    found = list(pieces(_magnitudes))
    own, kept = (zip(*(piece[which] for piece in found), strict=True) for which in (0, 1))  # by expert
    sums = [(math.fsum(one), math.fsum(other)) for one, other in zip(own, kept, strict=True)]
    ratios = [whole / masked if masked else 1.0 for whole, masked in sums]
    return torch.tensor([ratio if math.isfinite(ratio) else 1.0 for ratio in ratios])  # refused by its tensor's name


def emr(
    base: torch.Tensor, experts: torch.Tensor, params: EmrParams, *, numbers: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What is stored for one tensor, from base (*shape), experts (T, *shape), rescalers (T,)."""
    deltas = experts - base
    unified = agreeing(deltas, "max")
    return {
        "unified": stored(unified, params),
        "masks": to_bits(deltas.mul_(unified).relu_()),
        "scales": numbers.float(),
    }


def restore(base: torch.Tensor, packed: Mapping[str, torch.Tensor], index: int, params: EmrParams) -> torch.Tensor:
    """One expert's tensor: base (*shape) -> (*shape) float32."""
    unified = packed["unified"].to(base)
    return base + from_bits(packed["masks"][index], base).mul_(unified).mul_(float(packed["scales"][index]))


def _magnitudes(piece: Piece) -> tuple[list[float], list[float]]:
    """Each expert's sum of |delta_t|, and of |mask_t * unified|, over a piece."""
    deltas = piece.deltas.flatten(1)
    unified = agreeing(deltas, "max")
    kept = (deltas * unified).sign_().relu_().mul_(unified.abs())
    return [summed(own) for own in deltas.abs_()], [summed(own) for own in kept]
