"""RanDeS: every expert's change is multiplied by random signs of its own, and one sum of them all is stored.

Source: Zhou et al. 2025, arXiv:2505.11204 (random binary diagonal matrices; superpose, then retrieve).
Differs: layers are not shuffled between experts, which is the paper's second means against interference. The signs
follow from the seed and the names of tensor and expert; FusionBench seeds by a hash that differs between processes.
Tensors that are not bound are shared by all experts as their summed changes, as FusionBench has them.
Formula: S = sum_i delta_i * diag(c_i), c_i in {-1, 1}^columns; restored_t = base + scale * S * diag(c_t)
= base + scale * (delta_t + sum over i != t of delta_i * diag(c_i * c_t)), the last sum being noise of mean zero
Cost: O(T n) time, T + 3 tensors of memory; stored: n numbers for any T
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.kinds import Place
from methods.lazy import torch
from methods.packing import PackingParams, check_packed, is_packed, stored
from methods.parameters import tunable
from methods.primitives import changes

if TYPE_CHECKING:
    from methods.kinds import Draw


@dataclass(frozen=True)
class RandesParams(PackingParams):
    """Parameters of `randes`; also the schema of conf/method/randes.yaml."""

    scale: float = tunable(0.5, low=0.1, high=1.0)  # multiplies what is retrieved
    matrices: str = "blocks"  # bound: linear layers of the blocks, all `linear` layers, or `all` matrices

    def __post_init__(self) -> None:
        super().__post_init__()
        check_packed(self.matrices)


def randes(
    base: torch.Tensor, experts: torch.Tensor, params: RandesParams, *, draw: Draw, place: Place
) -> dict[str, torch.Tensor]:
    """What is stored for one tensor: base (*shape), experts (T, *shape) -> `superposed` (*shape)."""
    if not is_packed(base.shape, place, params.matrices):
        return {"superposed": stored(changes(base, experts), params)}
    total = torch.zeros_like(base)
    for index, expert in enumerate(experts):
        total += (expert - base).mul_(_signs(draw, index, base))
    return {"superposed": stored(total, params)}


def restore(
    base: torch.Tensor,
    packed: Mapping[str, torch.Tensor],
    index: int,
    params: RandesParams,
    *,
    draw: Draw,
    place: Place,
) -> torch.Tensor:
    """One expert's tensor with the others' noise: base (*shape) -> (*shape) float32."""
    found = packed["superposed"].to(base) * params.scale
    if is_packed(base.shape, place, params.matrices):
        found *= _signs(draw, index, base)
    return base + found


def _signs(draw: Draw, index: int, like: torch.Tensor) -> torch.Tensor:
    """One sign for each column, (n,) of an (m, n) matrix."""
    return torch.where(draw(index)[0] < 0.5, -1.0, 1.0).to(like)
