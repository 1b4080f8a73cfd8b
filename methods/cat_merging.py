"""CAT Merging: task arithmetic on changes trimmed where they disturb what another task's features carry.

Source: Sun et al. 2025, arXiv:2505.06977: for each task k the outputs on which the others' changes act most on k's
features and least on their own, removed from the others' changes: for linear layers by projection on a basis, for
scales and shifts by a mask.
Differs: `cat_merging` needs no data: a change's own rows, which fine-tuning has drawn from the layer's inputs, stand
for the features, scaled to one energy; `cat_merging_informed` has the paper's. In which order changes are trimmed is
ours to say: bases and masks come from the changes as they were, and projections follow the order of tasks. All bases
together take at most half of a layer's outputs, or else narrow layers were emptied. What is neither a linear layer nor
a vector (convolutions, embeddings, scalars) is merged untrimmed.
Formula: merged = base + scale * sum_i prod_{k != i} (I - B_k B_k^T) delta_i, B_k = top eigenvectors of
sum_{i != k} delta_i (G_k - preserve * G_i) delta_i^T
Cost: O(T^2 (m n + n^2) k) time for m x n with k = min(m, 9 (2 rank + 4)), T (3 m n + 2 n^2) numbers
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Place
from methods.lazy import torch
from methods.parameters import Params, at_least, tunable
from methods.primitives import add_up

_EXACT = 256  # outputs of a layer up to which all eigenvectors are had, in float64
_BLOCKS = 8


@dataclass(frozen=True)
class CatMergingParams(Params):
    """Parameters of `cat_merging`; also the schema of conf/method/cat_merging.yaml."""

    scale: float = tunable(0.3, low=0.0, high=1.5)  # multiplies the sum of trimmed task vectors (alpha)
    rank: int = tunable(3, low=1, high=16)  # directions, or entries of a vector, that each task removes from others (c)
    preserve: float = tunable(1.0, low=0.0, high=10.0)  # how much a change's own task counts against removal (lambda)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("rank", self.rank, 1)
        at_least("preserve", self.preserve, 0)


@dataclass(frozen=True)
class CatMergingInformedParams(CatMergingParams):
    """Parameters of `cat_merging_informed`; also the schema of conf/method/cat_merging_informed.yaml."""


def cat_merging(base: torch.Tensor, experts: torch.Tensor, params: CatMergingParams, *, place: Place) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape)."""
    deltas = experts - base
    features = _own_rows(deltas) if place.linear and deltas.dim() == 3 else None
    return _merged(base, deltas, features, params)


def cat_merging_informed(
    base: torch.Tensor, experts: torch.Tensor, params: CatMergingParams, *, stats: torch.Tensor | None
) -> torch.Tensor:
    """The same with features: Gram matrices `stats` (T, in, in), or for a scale the mean squares it scales, (T, n).

    Raises:
        ValueError: The features have another shape.
    """
    deltas = experts - base
    if stats is not None and stats.shape != (*deltas.shape[:1], *deltas.shape[-1:] * (deltas.dim() - 1)):
        raise ValueError(
            f"features are (in, in) for a weight (out, in) and (n,) for a scale (n,), got {tuple(stats.shape[1:])} for "
            f"{tuple(base.shape)}"
        )
    return _merged(base, deltas, stats, params)


def _merged(
    base: torch.Tensor, deltas: torch.Tensor, features: torch.Tensor | None, params: CatMergingParams
) -> torch.Tensor:
    others = len(deltas) - 1
    n_removed = min(params.rank, deltas.shape[1] // (2 * others)) if others and deltas.dim() > 1 else 0
    if n_removed and features is not None and features.dim() == 3:
        exact = torch.float64 if deltas.shape[1] <= _EXACT else torch.float32
        deltas = _projected(deltas.to(exact), features.to(exact), params.preserve, n_removed).to(base)
    elif n_removed and deltas.dim() == 2:
        deltas = _masked(deltas, features, params.preserve, n_removed)
    return add_up(deltas).mul_(params.scale).add_(base)


def _own_rows(deltas: torch.Tensor) -> torch.Tensor:
    """Gram matrices of the changes' rows, (T, m, n) -> (T, n, n), the mean of each diagonal 1."""
    grams = deltas.mT @ deltas
    sizes = grams.diagonal(dim1=1, dim2=2).mean(1)
    return grams / (sizes + sizes.eq(0))[:, None, None]


def _projected(deltas: torch.Tensor, grams: torch.Tensor, preserve: float, rank: int) -> torch.Tensor:
    """The changes without what disturbs the other tasks, (T, m, n), Gram matrices (T, n, n)."""
    trimmed = deltas.clone()
    for k in range(len(deltas)):
        rest = [i for i in range(len(deltas)) if i != k]
        basis = removal_basis(deltas[rest], grams[rest], grams[k], preserve, rank)
        for i in rest:
            trimmed[i] -= basis @ (basis.mT @ trimmed[i])
    return trimmed


def removal_basis(
    deltas: torch.Tensor, grams: torch.Tensor, gram: torch.Tensor, preserve: float, rank: int
) -> torch.Tensor:
    """Where changes (T, m, n) act most on a task's features (n, n) and least on their own (T, n, n): (m, rank).

    Of wide layers the eigenvectors are had from products with blocks of vectors (block Lanczos, all of them kept).
    """

    def conflict(vectors: torch.Tensor) -> torch.Tensor:  # (m, b) -> (m, b)
        read = deltas.mT @ vectors
        return add_up(deltas @ (gram @ read - preserve * (grams @ read)))

    m, width = deltas.shape[1], 2 * rank + 4
    space = torch.eye(m, dtype=deltas.dtype, device=deltas.device)
    if m > max(_EXACT, 8 * width):
        total = add_up(deltas)
        space = torch.linalg.qr(total[:, total.norm(dim=0).topk(min(width, total.shape[1])).indices]).Q
        block = space
        for _ in range(min(_BLOCKS, m // width - 2)):
            block = conflict(block)
            for _ in range(3):  # what is left of a space that is used up is noise: once is not enough
                block = torch.linalg.qr(block - space @ (space.mT @ block)).Q
            space = torch.cat([space, block], dim=1)
    inner = space.mT @ conflict(space)
    return space @ torch.linalg.eigh((inner + inner.mT) / 2).eigenvectors[:, -rank:]


def _masked(deltas: torch.Tensor, features: torch.Tensor | None, preserve: float, n_masked: int) -> torch.Tensor:
    """The changes of a scale (features (T, n)) or of a shift (None) without entries that disturb others, (T, n)."""
    squares = deltas.square()
    kept = torch.ones_like(deltas)
    for k in range(len(deltas)):
        rest = [i for i in range(len(deltas)) if i != k]
        weighed = squares if features is None else squares * (features[k] - preserve * features)
        places = add_up(weighed[rest]).topk(n_masked).indices
        for i in rest:
            kept[i, places] = 0
    return deltas * kept
