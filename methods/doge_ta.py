"""DOGE: one modification shared by all changes, learnt off their shared directions to bring the merge near each expert.

Source: Wei et al. 2025, arXiv:2501.01230, with task arithmetic; the loss's sums over rows, the subspace and
the defaults as in FusionBench, whose makers are among its authors.
Differs: linear layers are told by their place in any architecture, where the authors' code asks for CLIP's or T5's
names. What is none takes the mean of the changes; with others=base it stays as it is, as in that code. Exactly the
given share of the linear layers' changes is kept, where FusionBench keeps one entry more. An all-zero change takes no
part. The gradient is written out.
Formula: l_i = eta / ||delta_i||, L = sum_i l_i; d from 0 by Adam on sum_j sum_rows (sum_cols delta_j (delta_j -
sum_i l_i delta_i - L d))^2, gradients less their part in the shared directions;
merged = base + scale * sum_i l_i mask_i (delta_i + d)
Cost: O(T m n min(m, n) + steps m n (T + k)) time, k = min(m, n) / subspace, (2 T + 6) m n numbers
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from methods.adam import Adam
from methods.kinds import Piece, Pieces, Place
from methods.lazy import torch
from methods.matrices import changes_as_matrices, mean_change
from methods.parameters import Params, at_least, positive, share, tunable, word
from methods.primitives import add_up, keep_above
from methods.selection import kth_largest
from methods.spectra import leading


@dataclass(frozen=True)
class DogeTaParams(Params):
    """Parameters of `doge_ta`; also the schema of conf/method/doge_ta.yaml."""

    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change
    eta: float = tunable(0.07, low=0.01, high=0.5)  # norm that each expert's change is brought to in each matrix
    density: float = share(0.3, low=0.05, high=1.0)  # share of each change kept, over all matrices, in (0, 1]
    subspace: int = tunable(6, low=2, high=12)  # the shared directions are one in so many of all
    lr: float = tunable(1e-4, low=1e-5, high=1e-3, log=True)  # Adam's learning rate
    steps: int = 400  # updates for each matrix, at least 0
    matrices: str = word("linear", "all", "conv")  # what is a matrix: methods/matrices.py
    others: str = word("mean", "base")  # what is no such matrix: the mean of the changes, or the base's

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("eta", self.eta, 0)
        at_least("subspace", self.subspace, 1)
        positive("lr", self.lr)
        at_least("steps", self.steps, 0)


def thresholds(pieces: Pieces, params: DogeTaParams) -> torch.Tensor | None:
    """Smallest magnitude that each expert keeps, (T,), over all matrices of the model; None where all is kept."""
    if params.density == 1:
        return None

    def walk(function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Iterable[Any]:
        def own(piece: Piece) -> Any:
            assert piece.base is not None, "the row says that its method needs a base"
            deltas = changes_as_matrices(piece.base, piece.experts, piece.place, params.matrices)
            none = piece.experts.new_empty(len(piece.experts), 0)
            return function(none if deltas is None else deltas.flatten(1)[:, :limit])

        return pieces(own, limit)

    return kth_largest(walk, params.density)


def prepared(params: DogeTaParams) -> tuple[str, ...]:
    """What `thresholds` reads once for the whole model, and so cannot differ from tensor to tensor."""
    return ("density",)


def doge_ta(
    base: torch.Tensor, experts: torch.Tensor, params: DogeTaParams, *, numbers: torch.Tensor | None, place: Place
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), thresholds (T,) -> (*shape), all float32."""
    deltas = changes_as_matrices(base, experts, place, params.matrices)
    if deltas is None:
        return base + params.scale * mean_change(base, experts) if params.others == "mean" else base.clone()
    norms = torch.linalg.vector_norm(deltas.double(), dim=(1, 2))
    weights = torch.where(norms > 0, params.eta / norms, 0.0).tolist()
    shared = _modification(deltas, weights, params)
    changed = deltas + shared
    if numbers is not None:
        changed *= keep_above(deltas, numbers).ne(0)
    merged = add_up(changed, weights)
    return base + params.scale * merged.reshape(base.shape)


def _modification(deltas: torch.Tensor, weights: list[float], params: DogeTaParams) -> torch.Tensor:
    """What is added to every change, (T, m, n) -> (m, n)."""
    rows = deltas.transpose(0, 1).contiguous()  # (m, T, n)
    total = sum(weights)
    shared = torch.zeros_like(deltas[0])
    basis = _shared_directions(deltas, params.subspace)
    fixed = (rows * (rows - add_up(deltas, weights)[:, None])).sum(2)  # (m, T)
    adam = Adam(shared, params.lr)
    for _ in range(params.steps):
        away = fixed - total * torch.bmm(rows, shared[..., None])[..., 0]
        gradient = torch.bmm((-2 * total * away)[:, None], rows)[:, 0]
        adam.step(gradient - basis @ (gradient.mT @ basis).mT)  # in this order, bits do not hang on threads
    return shared


def _shared_directions(deltas: torch.Tensor, subspace: int) -> torch.Tensor:
    """Orthonormal output directions that the changes share, (T, m, n) -> (m, k)."""
    n_experts, m, n = deltas.shape
    own = [leading(delta, min(m, n) // n_experts).u for delta in deltas]
    return leading(torch.cat(own, dim=1), min(m, n) // subspace).u.to(deltas)
