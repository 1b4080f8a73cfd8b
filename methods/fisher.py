"""Fisher merging: the mean of the experts, each weight counted by how much its expert's predictions depend on it.

Source: Matena and Raffel 2022, arXiv:2111.09832, equation 2 and section 3 (diagonal Fisher, optional normalisation).
Differs: nothing; `floor` is added to the Fisher values, as FusionBench does, so that entries that no expert cares for
become the average. The diagonals given are true ones (per-sample gradients squared, then averaged).
Formula: merged = sum_i c_i (F_i + floor) expert_i / sum_i c_i (F_i + floor), entry by entry
Cost: O(T n) time, 4 T chunks of memory besides the T n Fisher values; these take a backward pass for each example
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Piece, Pieces
from methods.lazy import torch
from methods.parameters import Params, per_expert, positive, tunable
from methods.primitives import add_up, spread


@dataclass(frozen=True)
class FisherParams(Params):
    """Parameters of `fisher`; also the schema of conf/method/fisher.yaml."""

    normalize: bool = True  # divide each expert's Fisher values by their norm over the model
    floor: float = tunable(1e-6, low=1e-8, high=1e-3, log=True)  # added to every Fisher value
    weights: list[float] | None = None  # one coefficient for each expert; null for equal ones

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("floor", self.floor)
        if self.weights is not None and (min(self.weights) < 0 or max(self.weights) == 0):
            raise ValueError(f"weights must not be negative, nor all zero, got {list(self.weights)}")


def weights(pieces: Pieces, params: FisherParams) -> torch.Tensor:
    """Coefficient of each expert, (T,): its own times one over the norm of its Fisher values over the model.

    Raises:
        ValueError: A tensor has no Fisher values, or there are not as many weights as experts.
    """
    squares = torch.zeros(())
    for found in pieces(_squares):
        squares = squares + found
    given = torch.tensor(per_expert("weights", params.weights or 1.0, len(squares)), dtype=torch.float64)
    if not params.normalize:
        return given
    shares = 1 / (squares.sqrt() + params.floor)
    return given * shares / shares.sum()


def prepared(params: FisherParams) -> tuple[str, ...]:
    """What `weights` reads once for the whole model, and so cannot differ from tensor to tensor."""
    return ("weights", "floor") if params.normalize else ("weights",)


def _squares(piece: Piece) -> torch.Tensor:
    """Sum of squares of each expert's Fisher values in a piece, (T,)."""
    if piece.stats is None:
        raise ValueError(f"fisher needs Fisher values for every tensor, and {piece.name} has none")
    return piece.stats.flatten(1).double().square().sum(1).cpu()


def fisher(
    base: torch.Tensor | None,
    experts: torch.Tensor,
    params: FisherParams,
    *,
    numbers: torch.Tensor,
    stats: torch.Tensor,
) -> torch.Tensor:
    """Merge one tensor: experts (T, *shape), diagonals `stats` (T, *shape) >= 0, coefficients (T,) -> (*shape).

    Raises:
        ValueError: The diagonals have another shape, or negative entries.
    """
    if stats.shape != experts.shape:
        raise ValueError(f"Fisher values are shaped like the weights {experts.shape[1:]}, got {stats.shape[1:]}")
    if (stats < 0).any():
        raise ValueError(f"Fisher values are squares and cannot be negative, got {float(stats.min())}")
    importance = spread(numbers, experts) * (stats + params.floor)
    return add_up(importance * experts) / add_up(importance)
