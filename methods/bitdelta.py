"""BitDelta: each matrix of an expert's change becomes its signs and one scale.

Source: Liu et al. 2024, arXiv:2402.10193, equations 1 to 4.
Differs: steps=0 leaves the scales at mean |delta|, which is best by least squares and what the paper starts from; with
more they are distilled as there, each expert's logits on inputs of its own task being the target. An untouched entry
counts as raised, as in the authors' code. Matrices are those of the blocks' linear layers, as in the paper; the rest is
stored as each expert's own change.
Formula: restored_t = base + mean|delta_t| * sgn(delta_t)
Cost: O(T n) time, 3 tensors of memory besides the experts; stored: T n bits and T scales for each matrix
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from methods.kinds import Place
from methods.lazy import torch
from methods.packing import PackingParams, check_packed, from_bits, is_packed, position, stored, to_bits
from methods.parameters import at_least, positive, tunable

_BLOCK = 4096  # numbers summed together


@dataclass(frozen=True)
class BitdeltaParams(PackingParams):
    """Parameters of `bitdelta`; also the schema of conf/method/bitdelta.yaml."""

    matrices: str = "blocks"  # one bit an entry: linear layers of the blocks, all `linear` layers, or `all` matrices
    rows: bool = False  # a scale for each row of a matrix instead of one for all of it
    steps: int = 0  # of distillation, which learns the scales from inputs of each expert's task; 0 takes no inputs
    lr: float = tunable(1e-4, low=1e-6, high=1e-2, log=True)  # Adam's learning rate for the scales

    def __post_init__(self) -> None:
        super().__post_init__()
        check_packed(self.matrices)
        at_least("steps", self.steps, 0)
        positive("lr", self.lr)


def members(params: BitdeltaParams, names: tuple[str, ...]) -> tuple[str, ...]:
    """The experts that are read: each is packed on its own, so that one restored needs no other.

    Raises:
        ValueError: The pool has no expert of that name.
    """
    return names if params.expert is None else (names[position(params.expert, names)],)


def bitdelta(
    base: torch.Tensor, experts: torch.Tensor, params: BitdeltaParams, *, place: Place
) -> dict[str, torch.Tensor]:
    """What is stored for one tensor: base (*shape), experts (T, *shape) -> `signs` and `scales`, or `changes`."""
    if not is_packed(base.shape, place, params.matrices):
        return {"changes": stored(experts - base, params)}
    signs, scales = [], []
    for expert in experts:
        delta = expert - base
        signs.append(to_bits(delta.ge(0)[None]))
        scales.append(_means(delta.abs_(), params.rows))
    return {"signs": torch.cat(signs), "scales": torch.stack(scales)}


def restore(
    base: torch.Tensor, packed: Mapping[str, torch.Tensor], index: int, params: BitdeltaParams, *, place: Place
) -> torch.Tensor:
    """One expert's tensor: base (*shape) -> (*shape) float32."""
    if "changes" in packed:
        return base + packed["changes"][index].to(base)
    signs = from_bits(packed["signs"][index], base).mul_(2).sub_(1)
    return base + signs.mul_(packed["scales"][index].to(base))


def _means(magnitudes: torch.Tensor, rows: bool) -> torch.Tensor:
    """Mean of a matrix, () float32, or of each row, (m, 1): summed row by row, so that threads change no bit of it."""
    sums = [block.double().sum(1) for block in magnitudes.split(_BLOCK, dim=1)]
    per_row = torch.stack(sums).sum(0)[:, None]
    if rows:
        return (per_row / magnitudes.shape[1]).float()
    return torch.tensor(math.fsum(per_row.flatten().tolist()) / magnitudes.numel(), dtype=torch.float32)
