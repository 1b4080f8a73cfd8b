"""The convex combination of gradients with the least norm: a direction that lowers every task's loss, or zero.

Source: Sener & Koltun 2018, arXiv:1810.04650, Algorithms 1 and 2 (two tasks in closed form, more by Frank-Wolfe);
pairwise steps, which move weight from the worst task to the best: Lacoste-Julien & Jaggi 2015, arXiv:1511.05932.
Differs: nothing with margin 0. The authors' code, and tools after it, never give one of two tasks all the weight:
margin 0.001.
"""

from __future__ import annotations

from collections.abc import Sequence

from methods.lazy import torch

_STEPS = 1000  # at most, for three tasks or more
_ENOUGH = 1e-12  # of the largest squared norm: a step that cannot gain more is the last


def min_norm(products: torch.Tensor | Sequence[Sequence[float]], margin: float = 0.0) -> list[float]:
    """Weights of the combination, one for each task, not negative, summing to one.

    Args:
        products: Inner products of the gradients, (T, T), symmetric.
        margin: Of two tasks where one would have all the weight, the other has so much; in [0, 0.5).

    >>> min_norm([[1.0, 0.0], [0.0, 3.0]])
    [0.75, 0.25]
    >>> min_norm([[1.0, 2.0], [2.0, 9.0]])
    [1.0, 0.0]
    """
    square = torch.as_tensor(products, dtype=torch.float64)
    if len(square) == 2:
        first = _of_two(float(square[0, 0]), float(square[0, 1]), float(square[1, 1]), margin)
        return [first, 1 - first]
    weights = torch.full((len(square),), 1 / len(square), dtype=torch.float64)
    for _ in range(_STEPS):
        slopes = square @ weights
        best = int(slopes.argmin())
        worst = int(slopes.masked_fill(weights <= 0, -torch.inf).argmax())
        gain = float(slopes[worst] - slopes[best])
        if gain <= _ENOUGH * float(square.diagonal().max()):
            break
        curve = float(square[best, best] + square[worst, worst] - 2 * square[best, worst])
        moved = min(gain / curve, float(weights[worst])) if curve > 0 else float(weights[worst])
        weights[best] += moved
        weights[worst] -= moved
    return weights.tolist()


def _of_two(first: float, inner: float, second: float, margin: float) -> float:
    """The first's weight, from squared norms and inner product."""
    if inner >= first:
        return 1 - margin
    if inner >= second:
        return margin
    return (second - inner) / (first + second - 2 * inner)
