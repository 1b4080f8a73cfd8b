"""Which tensors a matrix rule takes for matrices, and how they are laid out for it.

`matrices` is one parameter of every such rule: `all` takes every two-dimensional tensor, `linear` only the weights of
linear layers, `conv` every two-dimensional tensor and kernels of three to five dimensions, (out, in, kh, kw), as
(out, in * kh * kw). A tensor without numbers is no matrix; one row or one column is. What is no matrix is merged by the
mean of the changes, unless a rule says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from methods.kinds import Place
from methods.lazy import torch
from methods.primitives import changes


class RankError(ValueError):
    """A parameter asks for more directions than a tensor has."""


def check_rank_of(name: str, rank: int, shape: Sequence[int]) -> None:
    """Refuse a rank above the shorter side of a matrix, (m, n).

    Raises:
        RankError: As above.
    """
    if rank > min(shape):
        raise RankError(f"{name} must be at most {min(shape)} for a matrix of shape {tuple(shape)}, got {rank}")


def as_matrices(tensors: torch.Tensor, place: Place, matrices: str) -> torch.Tensor | None:
    """Tensors stacked over experts, (T, *shape), as (T, m, n), no copy; None where the shape is no matrix.

    The way back is `found.reshape(shape)`, for kernels too.

    Args:
        tensors: Weights or changes; one tensor is given as `tensor[None]`.
        place: Where the tensor stands; `linear` asks it.
        matrices: `all`, `linear` or `conv`.

    >>> as_matrices(torch.zeros(2, 4, 3, 5, 5), Place(), "conv").shape
    torch.Size([2, 4, 75])
    """
    dims = tensors.dim() - 1
    if tensors.numel() == 0 or dims < 2:
        return None
    if dims == 2:
        return tensors if matrices != "linear" or place.linear else None
    return tensors.flatten(2) if matrices == "conv" and dims <= 5 else None


def as_matrix(tensor: torch.Tensor, place: Place, matrices: str) -> torch.Tensor | None:
    """The same for one tensor, (*shape) -> (m, n)."""
    found = as_matrices(tensor[None], place, matrices)
    return None if found is None else found[0]


def changes_as_matrices(base: torch.Tensor, experts: torch.Tensor, place: Place, matrices: str) -> torch.Tensor | None:
    """The task vectors, (*shape), (T, *shape) -> (T, m, n), in memory of their own; None where shape is no matrix."""
    laid = as_matrices(experts, place, matrices)
    return None if laid is None else laid - base.reshape(laid.shape[1:])


def mean_change(base: torch.Tensor, experts: torch.Tensor, weights: Sequence[float] | None = None) -> torch.Tensor:
    """Mean of the task vectors, each multiplied by its weight: (*shape), (T, *shape) -> (*shape)."""
    return changes(base, experts, weights).div_(len(experts))
