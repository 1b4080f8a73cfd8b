"""Inner products of tensors, from which every angle and length that a spherical method asks for is had.

A point on the sphere through some tensors is a sum of them with coefficients: methods find those in float64 from the
table of inner products, (T, T), and touch the tensors themselves once more only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from methods.lazy import torch
from methods.primitives import summed as total

_BLOCK = 512  # numbers summed together in float32, whatever the number of threads
_PIECE = 1 << 18  # numbers looked at together: a core's cache holds them
_PARALLEL = 1e-6  # one minus a cosine's magnitude below which there is no plane to turn in


def inner_products(tensors: torch.Tensor, origin: torch.Tensor | None = None) -> torch.Tensor:
    """Of each pair of tensors, (T, *shape) float32 -> (T, T) float64, counted from an origin, (*shape), if any."""
    flat = tensors.reshape(len(tensors), -1)
    start = None if origin is None else origin.flatten()
    found = []
    for first in range(0, flat.shape[1], _PIECE):
        part = flat[:, first : first + _PIECE]
        found.append(_products(part if start is None else part - start[first : first + _PIECE]))
    return summed(found)


def _products(flat: torch.Tensor) -> torch.Tensor:
    """Inner products of some numbers of each tensor, (T, n) -> (T, T) float64."""
    whole = flat.shape[1] // _BLOCK * _BLOCK
    blocks = flat[:, :whole].reshape(len(flat), -1, _BLOCK).transpose(0, 1)  # (n, T, block)
    rest = flat[:, whole:].double()
    return summed([torch.bmm(blocks, blocks.mT).double(), (rest @ rest.T)[None]])


def row_products(rows: torch.Tensor) -> torch.Tensor:
    """Inner products of each pair of tensors row by row, (T, m, n) float32 -> (m, T, T) float64."""
    turned = rows.transpose(0, 1)
    return torch.bmm(turned, turned.mT).double()


def summed(tables: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of tables (T, T) or stacks of them, each number rounded once: how a tensor is cut hardly matters."""
    size, rows = 0, []
    for table in tables:  # kept as numbers: small tensors would hold the pages of the large ones that came between them
        size = table.shape[-1]
        rows += table.reshape(-1, size * size).tolist()
    columns = zip(*rows, strict=True)
    return torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64).reshape(size, size)


def square_norms(tensors: torch.Tensor, origin: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of squares of each tensor, (T, *shape) float32 -> (T,) float64, counted from an origin, (*shape), if any."""
    changes = tensors if origin is None else (tensor - origin for tensor in tensors)
    return torch.tensor([total(change.double().square_()) for change in changes], dtype=torch.float64)


def cosines(products: torch.Tensor) -> torch.Tensor:
    """Cosine of each pair from inner products, (..., T, T) -> the same; zero where a tensor is all zero."""
    norms = products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = norms[..., :, None] * norms[..., None, :]
    return torch.where(scale > 0, products / scale.where(scale > 0, torch.ones_like(scale)), 0.0).clamp(-1, 1)


def arc(cosine: torch.Tensor, t: float, straight_above: float = 1 - _PARALLEL) -> tuple[torch.Tensor, torch.Tensor]:
    """What multiplies two tensors t of the way along the arc between them; on the straight line where there is none.

    Args:
        cosine: Of their angles, (...) float64.
        t: 0 is the first, 1 the second.
        straight_above: Magnitude of the cosine above which the way is straight.
    """
    angle = cosine.acos()
    straight = (cosine.abs() > straight_above) | (cosine.abs() == 1)
    sine = angle.sin().where(~straight, torch.ones_like(angle))
    first = (((1 - t) * angle).sin() / sine).where(~straight, torch.full_like(angle, 1 - t))
    return first, ((t * angle).sin() / sine).where(~straight, torch.full_like(angle, t))
