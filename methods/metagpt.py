"""MetaGPT: task arithmetic with a coefficient for each expert in closed form, its share of the squared norms.

Source: Zhou et al. 2024, arXiv:2406.11385 (closed form): lambda_i = ||delta_i||^2 / sum_j ||delta_j||^2, norms over all
weights of a model.
Differs: nothing with scope=model and scale 1; scope=tensor takes norms of each tensor on its own, `scale` multiplies
all coefficients.
Formula: merged = base + scale * sum_i lambda_i delta_i
Cost: O(T n) time twice (norms, then the merge), T + 3 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.angles import square_norms
from methods.kinds import Pieces
from methods.lazy import torch
from methods.parameters import Params, tunable, word
from methods.primitives import changes


@dataclass(frozen=True)
class MetagptParams(Params):
    """Parameters of `metagpt`; also the schema of conf/method/metagpt.yaml."""

    scale: float = tunable(1.0, low=0.0, high=2.0)  # multiplies the merged change
    scope: str = word("model", "tensor")  # model: norms over all weights; tensor: of each tensor


def coefficients(pieces: Pieces, params: MetagptParams) -> list[float]:
    """Coefficient of each expert, T of them, that sum to one; zeros where nothing has changed."""
    squares = sum(pieces(lambda piece: square_norms(piece.experts, piece.base)), torch.zeros((), dtype=torch.float64))
    return (squares / squares.sum()).nan_to_num(0.0).tolist()


def metagpt(base: torch.Tensor, experts: torch.Tensor, params: MetagptParams, *, numbers: list[float]) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), coefficients -> (*shape), all float32."""
    return changes(base, experts, numbers).mul_(params.scale).add_(base)
