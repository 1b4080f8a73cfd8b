"""LiNeS, a veneer: the merged change grows in a straight line with depth, so that early layers stay near the base.

Source: Wang et al. 2024, arXiv:2410.17146 (lambda of layer l among L is alpha + beta (l - 1) / (L - 1)).
Differs: nothing; what lies before the blocks takes the first block's factor, what follows them the last's. A model of
one block takes alpha + beta.
Formula: merged = base + (alpha + beta * (l - 1) / (L - 1)) * (rule - base)
Cost: O(n) time, one chunk of memory
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.kinds import Piece, Place
from methods.parameters import Params, tunable

if TYPE_CHECKING:
    from methods.kinds import Dressed
    from methods.lazy import torch


@dataclass(frozen=True)
class LinesParams(Params):
    """Parameters of `lines`."""

    alpha: float = tunable(0.5, low=0.0, high=1.0)  # factor of the first block
    beta: float = tunable(0.5, low=0.0, high=1.5)  # added to it in the last block


def lines(piece: Piece, params: LinesParams, numbers: None) -> Dressed:
    """The piece as it is, and the scaling of what the rule makes of it, (*shape) -> (*shape)."""
    base, factor = piece.base, params.alpha + params.beta * share_of_depth(piece.place)
    assert base is not None, "a veneer is given the base"

    def scaled(merged: torch.Tensor) -> torch.Tensor:
        return base + factor * (merged - base)

    return piece, scaled


def share_of_depth(place: Place) -> float:
    """How deep a tensor lies, in [0, 1].

    >>> [share_of_depth(Place(layer, 3)) for layer in range(5)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    if place.n_layers < 2:
        return 1.0 if place.layer else 0.0
    return min(max((place.layer - 1) / (place.n_layers - 1), 0.0), 1.0)
