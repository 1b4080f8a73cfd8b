"""The steps that methods share: sum, trim, drop, elect.

All take deltas or weights stacked over experts, (T, *shape) float32. Sums run expert by expert and element by element,
each step rounded on its own, so that a chunk of a tensor gives the same bits as the whole and the number of threads
changes nothing. Masks are had by arithmetic on floats: on a CPU several times faster than comparing and selecting.
"""

from __future__ import annotations

from collections.abc import Sequence

from methods.lazy import torch


def add_up(tensors: torch.Tensor, weights: Sequence[float] | torch.Tensor | None = None) -> torch.Tensor:
    """Sum over experts, (T, *shape) -> (*shape), each multiplied by its weight.

    >>> add_up(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [1.0, 0.5])
    tensor([2.5000, 4.0000])
    """
    if weights is None:
        total = tensors[0] + tensors[1] if len(tensors) > 1 else tensors[0].clone()
        for tensor in tensors[2:]:
            total += tensor
        return total
    total = tensors[0] * weights[0]
    for index, tensor in enumerate(tensors[1:], start=1):
        total += tensor * weights[index]
    return total


def changes(base: torch.Tensor, experts: torch.Tensor, weights: Sequence[float] | None = None) -> torch.Tensor:
    """Sum of the task vectors, (*shape), (T, *shape) -> (*shape), each multiplied by its weight."""
    total = torch.zeros_like(base)
    for index, expert in enumerate(experts):
        delta = expert - base
        total += delta if weights is None else delta.mul_(weights[index])
    return total


def average(experts: torch.Tensor) -> torch.Tensor:
    """Mean over experts, (T, *shape) -> (*shape): one sum, one division."""
    return add_up(experts).div_(len(experts))


def spread(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number for each expert, (T,), shaped to multiply (T, *shape)."""
    return numbers.to(like).reshape(-1, *[1] * (like.dim() - 1))


def keep_above(deltas: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Zero what is smaller in magnitude than its expert's threshold, (T, *shape), thresholds (T,)."""
    below = torch.nextafter(thresholds, torch.zeros(())).tolist()  # hardshrink keeps what is strictly larger
    kept = torch.empty_like(deltas)
    for delta, bound, out in zip(deltas, below, kept, strict=True):
        out.copy_(delta) if bound == 0 else torch.hardshrink(delta, bound, out=out)
    return kept


def drop(deltas: torch.Tensor, uniform: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """Keep each entry with probability `density` (its number is below it), divided by `density` to keep the mean."""
    mask = torch.sub(density, uniform).sign_().relu_()  # 1 where the number is below, 0 elsewhere
    kept = mask.mul_(deltas)
    return kept.div_(density) if rescale else kept


def agreeing(deltas: torch.Tensor, disjoint: str, weights: Sequence[float] | None = None) -> torch.Tensor:
    """Elect one sign for each entry by the sum of the deltas, merge those that have it, (T, *shape) -> (*shape).

    Args:
        deltas: Task vectors, zero where an expert does not vote.
        disjoint: `mean` over the entries that agree, their `sum`, or the `max`, the largest of them in magnitude.
        weights: One for each expert: its entries are multiplied by it before the vote, and the mean is divided by the
            sum of the weights of those that agree. None for ones.
    """
    elected = add_up(deltas, weights).sign_()  # (*shape), one of -1, 0, 1
    total = torch.zeros_like(elected)
    votes = torch.zeros_like(elected)
    for index, delta in enumerate(deltas):
        agreed = delta * elected if weights is None else (delta * weights[index]).mul_(elected)
        agreed.relu_()  # its magnitude where it has the elected sign, zero elsewhere
        if disjoint == "max":
            total = torch.maximum(total, agreed)
            continue
        total += agreed
        if disjoint == "mean":
            votes += agreed.sign_() if weights is None else agreed.sign_().mul_(weights[index])
    total *= elected
    if disjoint != "mean":
        return total
    return total.div_(votes.add_(votes.eq(0))) if weights is not None else total.div_(votes.clamp_(min=1))
