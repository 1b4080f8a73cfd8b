"""The steps that methods share: sum, trim, drop, elect.

All take deltas or weights stacked over experts, (T, *shape) float32. Sums run expert by expert and element by element,
so that a chunk of a tensor gives the same bits as the whole and the number of threads changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from methods.lazy import torch


def add_up(tensors: torch.Tensor, weights: Sequence[float] | torch.Tensor | None = None) -> torch.Tensor:
    """Sum over experts, (T, *shape) -> (*shape), each multiplied by its weight.

    >>> add_up(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [1.0, 0.5])
    tensor([2.5000, 4.0000])
    """
    total = torch.zeros_like(tensors[0])
    for index, tensor in enumerate(tensors):
        if weights is None:
            total += tensor
        else:
            total += tensor * weights[index]
    return total


def average(experts: torch.Tensor) -> torch.Tensor:
    """Mean over experts, (T, *shape) -> (*shape): one sum, one division."""
    return add_up(experts) / len(experts)


def spread(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number for each expert, (T,), shaped to multiply (T, *shape)."""
    return numbers.to(like).reshape(-1, *[1] * (like.dim() - 1))


def keep_above(deltas: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Zero what is smaller in magnitude than its expert's threshold, (T, *shape), thresholds (T,)."""
    return deltas * (deltas.abs() >= spread(thresholds, deltas))


def drop(deltas: torch.Tensor, uniform: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """Keep each entry with probability `density` (its number is below it), divided by `density` to keep the mean."""
    kept = deltas * (uniform < density)
    return kept / density if rescale else kept


def agreeing(deltas: torch.Tensor, disjoint: str) -> torch.Tensor:
    """Elect one sign for each entry by the sum of the deltas, merge those that have it, (T, *shape) -> (*shape).

    Args:
        deltas: Task vectors, zero where an expert does not vote.
        disjoint: `mean` over the entries that agree, their `sum`, or the `max`, the largest of them in magnitude.
    """
    elected = add_up(deltas).sign()  # (*shape), one of -1, 0, 1
    kept = deltas * (deltas.sign() == elected)
    if disjoint == "max":
        return kept.abs().amax(0) * elected
    total = add_up(kept)
    if disjoint == "sum":
        return total
    return total / (kept != 0).sum(0).clamp(min=1)
