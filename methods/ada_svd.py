"""AdaSVD: task arithmetic whose coefficients, layer by layer, are how much a router would send to each expert.

Source: the router of Tang et al. 2024 (SMILE), arXiv:2408.10174, equation 9: an expert is chosen by the length of the
input's projection on the leading right singular vectors of its change. Averaging it over inputs into coefficients of a
merge is FusionBench's `ada_svd`, which no paper describes.
Differs: directions of a change that has none (a rank below `rank`) do not count, where FusionBench takes arbitrary
ones. Inputs are a sample of each layer's, taken behind the blocks that are merged already; within a block they are
those of each expert's own, where FusionBench runs the routed mixture. What is no linear layer is averaged;
`average_rest=false` leaves it at the base as FusionBench does.
Formula: merged = base + scale * sum_i w_i delta_i, w = mean over inputs x of softmax_i ||V_i[:, :rank]^T x||
Cost: O(T (m n min(m, n) + s n rank)) time for m x n and s inputs of all tasks, 2 s n + 2 m n numbers; inputs take L
forward passes for each example, L the blocks
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Piece, Pieces, Place
from methods.lazy import torch
from methods.parameters import Params, at_least, tunable
from methods.primitives import changes

_FLAT = 1e-6  # a singular value below this share of the largest counts as none


@dataclass(frozen=True)
class AdaSvdParams(Params):
    """Parameters of `ada_svd`; also the schema of conf/method/ada_svd.yaml."""

    scale: float = tunable(1.0, low=0.0, high=3.0)  # multiplies the sum of weighted task vectors
    rank: int = tunable(16, low=1, high=64, log=True)  # how many singular vectors of each change route (gate_k)
    average_rest: bool = True  # what is no linear layer is averaged; false: the base's

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("rank", self.rank, 1)


def routing(pieces: Pieces, params: AdaSvdParams) -> dict[str, list[float]]:
    """The mean weight of each expert, (T,) with sum 1, for each linear layer by its module's path."""
    found = pieces(lambda piece: _routed(piece, params.rank))
    return {module: weights for module, weights in found if weights is not None}


def prepared(params: AdaSvdParams) -> tuple[str, ...]:
    """What `routing` reads once for the whole model, and so cannot differ from tensor to tensor."""
    return ("rank",)


def ada_svd(
    base: torch.Tensor,
    experts: torch.Tensor,
    params: AdaSvdParams,
    *,
    numbers: dict[str, list[float]],
    stats: torch.Tensor | None,
    place: Place,
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape); a layer's bias goes with its weight."""
    weights = numbers.get(_module(place.name))
    if weights is None:
        weights = [1 / len(experts) if params.average_rest else 0.0] * len(experts)
    return changes(base, experts, weights).mul_(params.scale).add_(base)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _routed(piece: Piece, rank: int) -> tuple[str, list[float] | None]:
    """A layer's path and weights; none where it has no inputs.

    Raises:
        ValueError: The inputs are not of the width of the layer's.
    """
    if piece.stats is None:
        return _module(piece.name), None
    width = piece.experts.shape[-1]
    if piece.experts.dim() != 3 or piece.stats.dim() != 3 or piece.stats.shape[2] != width:
        shape = tuple(piece.stats.shape[1:])
        raise ValueError(f"{piece.name}: inputs are (s, in) for a weight (out, in), got {shape}")
    inputs = piece.stats.flatten(0, 1).double()  # (T s, in), of all tasks
    logits = torch.stack([(inputs @ leading(delta, rank)).norm(dim=1) for delta in piece.deltas])
    return _module(piece.name), torch.softmax(logits, 0).mean(1).tolist()


def leading(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading right singular vectors of a change, (m, n) -> (n, rank or fewer) float64."""
    wide = delta.double()
    flat = wide.shape[0] < wide.shape[1]
    squares, vectors = torch.linalg.eigh(wide @ wide.mT if flat else wide.mT @ wide)  # rising
    squares, vectors = squares.flip(0)[:rank], vectors.flip(1)[:, :rank]
    kept = squares > _FLAT**2 * squares[0]
    vectors = vectors[:, kept]
    return wide.mT @ vectors / squares[kept].sqrt() if flat else vectors
