"""Pruning: weights of linear layers become zero, those smallest in magnitude or any at random.

Source: Han et al. 2015, arXiv:1506.02626, section 3.1, without the training that follows there; the share of each row
as Sun et al. 2023, arXiv:2306.11695, section 4; n of m as Mishra et al. 2021, arXiv:2104.08378, section 3.
Differs: of several experts the mean is pruned, so that what comes out is as sparse as is asked; `expert` names one.
density is what is kept, where others name what is pruned; of n:m n are kept, where FusionBench prunes n (2:4 is the
same). Of r inputs left over in a row that m does not divide, n r / m are kept, rounded up. Equal magnitudes on the
model's threshold are all kept. What is not pruned is the mean.
Formula: merged = mask * mean, mask 1 for the largest |mean|, or at random, of a row, a tensor, the model, or m inputs
Cost: O(T n + n log(row)) time, T + 4 numbers for each entry of a tensor; scope=model reads all weights twice more
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from methods.kinds import Piece, Pieces, Place
from methods.lazy import torch
from methods.packing import check_packed, is_packed, position
from methods.parameters import Params, at_least, share, word
from methods.primitives import average
from methods.selection import count_kept, kth_largest

if TYPE_CHECKING:
    from methods.kinds import Draw


@dataclass(frozen=True)
class PruningParams(Params):
    """Parameters of every method that prunes."""

    density: float = share(0.5, low=0.1, high=1.0)  # share of the weights kept, in (0, 1]
    n: int = 0  # weights kept of every m inputs of an output, 0 to m; with 0 the share `density` is kept instead
    m: int = 4  # inputs that n are kept of, side by side
    matrices: str = "blocks"  # what is pruned: linear layers of blocks, all `linear` ones, `experts` or `all` matrices
    expert: str | None = None  # the one that is pruned; null for the mean of all

    def __post_init__(self) -> None:
        super().__post_init__()
        check_packed(self.matrices)
        at_least("m", self.m, 1)
        if not 0 <= self.n <= self.m:
            raise ValueError(f"of every m weights n are kept, n in [0, m], got n {self.n} and m {self.m}")


@dataclass(frozen=True)
class PruneMagnitudeParams(PruningParams):
    """Parameters of `prune_magnitude`; also the schema of conf/method/prune_magnitude.yaml."""

    scope: str = word("row", "tensor", "model")  # keep the share of each output's weights, each tensor's, or of all


@dataclass(frozen=True)
class PruneRandomParams(PruneMagnitudeParams):
    """Parameters of `prune_random`; also the schema of conf/method/prune_random.yaml."""


def members(params: PruningParams, names: tuple[str, ...]) -> tuple[str, ...]:
    """The experts that are read: the one that is named, or all.

    Raises:
        ValueError: The pool has no expert of that name.
    """
    return names if params.expert is None else (names[position(params.expert, names)],)


def is_pruned(shape: Sequence[int], place: Place, params: PruningParams) -> bool:
    """Whether a tensor is pruned; linear layers stored as (in, out) are, as any other."""
    return is_packed(shape, replace(place, linear=place.linear or place.transposed), params.matrices)


def thresholds(pieces: Pieces, params: PruneMagnitudeParams) -> torch.Tensor | None:
    """The least score that is kept, (1,), over all that is pruned; none where each tensor knows its own."""
    if params.n or params.scope != "model":
        return None

    def walk(function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Any:
        return pieces(lambda piece: function(_of_piece(piece, params)[:, :limit]))

    return kth_largest(walk, params.density)


def prepared(params: PruneMagnitudeParams) -> tuple[str, ...]:
    """What `thresholds` reads once for the whole model, and so cannot differ from tensor to tensor."""
    return ("density", "n", "matrices") if params.scope == "model" else ()


def prune_magnitude(
    base: torch.Tensor | None,
    experts: torch.Tensor,
    params: PruneMagnitudeParams,
    *,
    numbers: torch.Tensor | None,
    place: Place,
) -> torch.Tensor:
    """Prune one tensor: experts (T, *shape) -> (*shape), float32."""
    mean = average(experts)
    return _pruned(mean, mean.abs(), params, numbers, place)


def prune_random(
    base: torch.Tensor | None,
    experts: torch.Tensor,
    params: PruneRandomParams,
    *,
    numbers: torch.Tensor | None,
    draw: Draw,
    place: Place,
) -> torch.Tensor:
    """Prune one tensor: experts (T, *shape) -> (*shape), float32."""
    return _pruned(average(experts), _chances(draw, len(experts)), params, numbers, place)


def chosen(scores: torch.Tensor, params: PruningParams, scope: str) -> torch.Tensor:
    """Where the best scores are, (out, in) -> bool (out, in): n of every m in a row, or the share of row or tensor."""
    if not params.n:
        rows = scores.reshape(1, -1) if scope == "tensor" else scores
        return largest(rows, count_kept(params.density, rows.shape[1])).reshape(scores.shape)
    whole = scores.shape[1] // params.m * params.m
    groups = largest(scores[:, :whole].reshape(-1, params.m), params.n).reshape(len(scores), whole)
    rest = scores[:, whole:]
    return torch.cat([groups, largest(rest, math.ceil(params.n * rest.shape[1] / params.m))], dim=1)


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` largest of each row are, (rows, n) -> bool (rows, n)."""
    if count >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    places = scores.topk(count, dim=1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, places, True)


def as_rows(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """A matrix as (out, in), and back again; no copy."""
    return tensor.mT if place.transposed else tensor


def _pruned(
    mean: torch.Tensor,
    scores: torch.Tensor,
    params: PruneMagnitudeParams,
    numbers: torch.Tensor | None,
    place: Place,
) -> torch.Tensor:
    """The mean where the scores are best, and zero elsewhere."""
    if not is_pruned(mean.shape, place, params):
        return mean
    if numbers is None:
        kept = as_rows(chosen(as_rows(scores, place), params, params.scope), place)
    else:
        kept = scores >= float(numbers[0])
    return mean.where(kept, 0.0)


def _of_piece(piece: Piece, params: PruneMagnitudeParams) -> torch.Tensor:
    """Scores of one tensor, (1, n), or none where it is not pruned, (1, 0)."""
    if not is_pruned(piece.experts.shape[1:], piece.place, params):
        return piece.experts.new_empty(1, 0)
    if piece.draw is not None:
        return _chances(piece.draw, len(piece.experts)).reshape(1, -1)
    return average(piece.experts).abs_().reshape(1, -1)


def _chances(draw: Draw, n_experts: int) -> torch.Tensor:
    """Uniform numbers in [0, 1], the same in whatever order the experts come."""
    return sum(draw(index).double() for index in range(n_experts)).remainder(1).float()  # type: ignore[union-attr]
