"""What the weights of experts tell: inner products, signs and norms of their changes in one walk, spectra in another.

Sources: cosines of task vectors: Ilharco et al. 2023, arXiv:2212.04089. Sign conflicts: Yadav et al. 2023,
arXiv:2306.01708. Effective rank: Roy and Vetterli 2007, the exponential of the spectrum's entropy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.apply import not_finite
from harness.crew import Crew
from harness.inputs import Inputs, MergeError, Tensors
from harness.look import task_vectors
from methods.kinds import Piece, Pieces
from methods.larv import entropy_rank, singular_squares
from pools.picked import Picked

GRID = 51  # points of a spectrum's curve, evenly over the share of directions
ENERGY = 0.9  # share of a change's squared norm, of which the rank is told

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Survey:
    """Sums over the weights of all layers."""

    products: torch.Tensor  # (T, T) float64, inner products of the task vectors
    both: torch.Tensor  # (T, T) weights that two experts change
    opposite: torch.Tensor  # (T, T) of them, those changed in opposite directions
    squares: torch.Tensor  # (L, T) squared norms of the changes by layer
    base: torch.Tensor  # (L,) squared norms of the base's weights
    shared: torch.Tensor  # (L,) weights that at least two experts change
    conflicts: torch.Tensor  # (L,) of them, those that not all change in the same direction
    summed: torch.Tensor  # (L,) absolute values of the sum of all changes, added up
    apart: torch.Tensor  # (L,) absolute values of each change, added up

    @property
    def cosines(self) -> torch.Tensor:
        """(T, T); a task vector of zeros is like nothing."""
        norms = self.products.diagonal().sqrt()
        scale = norms[:, None] * norms[None]
        return torch.where(scale > 0, self.products / scale, torch.zeros_like(scale))

    @property
    def opposed(self) -> torch.Tensor:
        """Share of the weights that two experts change, which they change in opposite directions, (T, T)."""
        return self.opposite / self.both.clamp(min=1)

    @property
    def conflict_shares(self) -> torch.Tensor:
        """By layer, (L,)."""
        return self.conflicts / self.shared.clamp(min=1)

    @property
    def cancelled(self) -> torch.Tensor:
        """Share of the changes' absolute values that the others cancel when all are added up, by layer, (L,)."""
        return 1 - self.summed / self.apart.clamp(min=1e-30)


def survey(inputs: Inputs, crew: Crew) -> Survey:
    """Look at all weights once, in chunks.

    Raises:
        MergeError: Weights are NaN or infinite; the message names the tensor and whose it is.
    """
    walk: Pieces = task_vectors(inputs, crew)
    n, n_layers = len(inputs.experts), inputs.roles.n_layers + 2
    pairs = torch.zeros(3, n, n, dtype=torch.float64)
    layers = torch.zeros(n_layers, n + 5, dtype=torch.float64)

    def look(piece: Piece) -> tuple[int, torch.Tensor, torch.Tensor]:
        found = _looked(piece)
        if not torch.isfinite(found[1]).all() or not torch.isfinite(found[2]).all():
            raise MergeError(not_finite(piece, tuple(inputs.experts), inputs.specs[piece.name]))
        return found

    for layer, of_pairs, of_layer in walk(look):
        pairs += of_pairs
        layers[layer] += of_layer
    products, both, opposite = pairs
    base, shared, conflicts, summed, apart = layers[:, n:].T
    return Survey(products, both, opposite, layers[:, :n], base, shared, conflicts, summed, apart)


def _looked(piece: Piece) -> tuple[int, torch.Tensor, torch.Tensor]:
    """A piece's layer; products, changed by both and opposite (3, T, T); sums of the layer (T + 5,)."""
    assert piece.base is not None
    deltas = piece.deltas.flatten(1)  # (T, n)
    signs = deltas.sign()
    moved = signs.abs()
    products = (deltas @ deltas.T).double().cpu()
    both = (moved @ moved.T).double().cpu()  # counts below 2^24: exact in float32
    opposite = (both - (signs @ signs.T).double().cpu()) / 2
    shared = moved.sum(0) >= 2
    conflicts = shared & (signs.sum(0).abs() < moved.sum(0))
    base = piece.base.flatten()
    rest = [torch.dot(base, base), shared.sum(), conflicts.sum(), deltas.sum(0).abs().sum(), deltas.abs().sum()]
    own = torch.cat([products.diagonal(), torch.stack([value.double().cpu() for value in rest])])
    return piece.place.layer, torch.stack([products, both, opposite]), own


@dataclass(frozen=True)
class Spectra:
    """Singular values of the changes of linear layers."""

    rows: Rows  # tensor, layer, expert, shape, norm, effective_rank, stable_rank, rank_90, share
    curves: dict[str, list[float]]  # expert -> mean share of the squared norm in the leading i / (GRID - 1) directions

    def by_layer(self, experts: Sequence[str], n_layers: int) -> list[list[float]]:
        """Mean effective rank by layer and expert, as a share of the full rank; NaN where a layer has no matrix."""
        return [
            [
                _mean([row["share"] for row in self.rows if row["layer"] == layer and row["expert"] == expert])
                for expert in experts
            ]
            for layer in range(n_layers + 2)
        ]


def spectra(inputs: Inputs, crew: Crew) -> Spectra:
    """Look at the weights of linear layers, one tensor at a time.

    Raises:
        MergeError: There are none.
    """
    own = _linear(inputs)
    names = list(inputs.experts)
    rows: Rows = []
    curves: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def look(piece: Piece) -> tuple[Piece, list[torch.Tensor]]:
        return replace(piece, base=None, experts=torch.empty(0)), [singular_squares(delta) for delta in piece.deltas]

    for piece, found in task_vectors(own, crew, whole=True)(look):
        for name, squares in zip(names, found, strict=True):
            rows.append(_row(piece, name, inputs.specs[piece.name].shape, squares))
            if float(squares.sum()) > 0:
                curves[name].append(_curve(squares))
    told = {name: torch.stack(each).mean(0).tolist() for name, each in curves.items() if each}
    return Spectra(rows, told)


def _linear(inputs: Inputs) -> Inputs:
    """The same, of linear layers' weights alone."""
    names = [name for name in inputs.specs if inputs.is_weight(name) and inputs.place(name).linear]
    if not names:
        raise MergeError("analyse.parts: the models have no linear layers whose spectra could be looked at")

    def narrowed(tensors: Tensors, source: str) -> Picked:
        return Picked({each: (tensors, each) for each in names}, source)

    assert inputs.base is not None
    experts = {name: narrowed(tensors, name) for name, tensors in inputs.experts.items()}
    return replace(inputs, base=narrowed(inputs.base, "base"), experts=experts)


def _row(piece: Piece, expert: str, shape: Sequence[int], squares: torch.Tensor) -> dict[str, Any]:
    """Numbers of one matrix's change; squares are rising."""
    total, top = float(squares.sum()), float(squares[-1])
    leading = squares.flip(0).cumsum(0)
    return {
        "tensor": piece.name,
        "layer": piece.place.layer,
        "expert": expert,
        "shape": "x".join(map(str, shape)),
        "norm": math.sqrt(total),
        "effective_rank": entropy_rank(squares) if total else 0.0,
        "stable_rank": total / top if top else 0.0,
        "rank_90": int((leading < ENERGY * total).sum()) + 1 if total else 0,
        "share": entropy_rank(squares) / len(squares) if total else 0.0,
    }


def _curve(squares: torch.Tensor) -> torch.Tensor:
    """Share of the sum in the leading directions, over their share of all: (GRID,), from 0 to 1."""
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), squares.flip(0).cumsum(0)]) / squares.sum()
    places = torch.linspace(0, len(squares), GRID, dtype=torch.float64)
    low = places.floor().long().clamp(max=len(squares) - 1)
    return sums[low] + (places - low) * (sums[low + 1] - sums[low])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
