"""Model recombination: the experts' layers shuffled, each layer on its own, so that every new model has one of each.

Source: Hu et al. 2023, arXiv:2305.10730 (FedMR).
Differs: nothing; a layer's tensors move together, and so do those before the first block and those after the last.
FusionBench shuffles every tensor of a model by itself. Of the recombined models, as many as experts, one is returned.
Formula: merged_l = expert_{pi_l(model), l}, pi_l a random permutation of the experts for each layer l
Cost: O(n) time, T + 1 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.kinds import Piece, Pieces, Place
from methods.lazy import torch

if TYPE_CHECKING:
    from methods.kinds import Draw

_LOOKED = 8  # elements of each piece that are read


@dataclass(frozen=True)
class ModelRecombinationParams:
    """Parameters of `model_recombination`; also the schema of conf/method/model_recombination.yaml."""

    model: int = 0  # which of the recombined models, 0 to T - 1; all of them together have every layer once

    def __post_init__(self) -> None:
        if self.model < 0:
            raise ValueError(f"model is one of the recombined models, from 0, got {self.model}")


def permutations(pieces: Pieces, params: ModelRecombinationParams) -> dict[int, int]:
    """Layer -> the expert that gives it.

    Raises:
        ValueError: There are not so many experts.
    """
    found: dict[int, tuple[str, list[float]]] = {}
    for layer, name, numbers in pieces(_drawn, _LOOKED):
        if layer not in found or name < found[layer][0]:
            found[layer] = name, numbers
    return {layer: _expert(numbers, params.model) for layer, (_, numbers) in found.items()}


def _drawn(piece: Piece) -> tuple[int, str, list[float]]:
    """A piece's layer, its name, and a number for each expert that stands for the layer if its name comes first."""
    assert piece.draw is not None, "the row says that its method draws"
    numbers = [float(piece.draw(index).reshape(-1)[0]) for index in range(len(piece.experts))]
    return piece.place.layer, piece.name, numbers


def _expert(numbers: list[float], model: int) -> int:
    """Whose number is at a place in their order."""
    if model >= len(numbers):
        raise ValueError(f"model is one of the {len(numbers)} recombined models, 0 to {len(numbers) - 1}, got {model}")
    return sorted(range(len(numbers)), key=numbers.__getitem__)[model]


def model_recombination(
    base: torch.Tensor | None,
    experts: torch.Tensor,
    params: ModelRecombinationParams,
    *,
    numbers: dict[int, int],
    draw: Draw,
    place: Place,
) -> torch.Tensor:
    """One expert's tensor, (T, *shape) -> (*shape), float32."""
    return experts[numbers[place.layer]].clone()
