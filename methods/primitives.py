"""The steps that methods share: sum, trim, drop, rescale, elect, combine.

All take deltas or weights stacked over experts, (T, *shape) float32. Sums run expert by expert and element by element,
each step rounded on its own, so that a chunk of a tensor gives the same bits as the whole and the number of threads
changes nothing. Masks are had by arithmetic on floats: on a CPU several times faster than comparing and selecting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from methods.lazy import torch
from methods.selection import count_kept

_BLOCK = 4096  # numbers summed together


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


def summed(values: torch.Tensor) -> float:
    """The sum in float64 of blocks' sums, so that threads, which share blocks out, change no bit of it."""
    values = values.flatten().double()
    whole = len(values) // _BLOCK * _BLOCK
    sums = values[:whole].view(-1, _BLOCK).sum(1).tolist()
    return math.fsum([*sums, float(values[whole:].sum())])


def keep_above(deltas: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Zero what is smaller in magnitude than its expert's threshold, (T, *shape), thresholds (T,)."""
    below = torch.nextafter(thresholds, torch.zeros(())).tolist()  # hardshrink keeps what is strictly larger
    kept = torch.empty_like(deltas)
    for delta, bound, out in zip(deltas, below, kept, strict=True):
        out.copy_(delta) if bound == 0 else torch.hardshrink(delta, bound, out=out)
    return kept


def keep_between(deltas: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
    """Zero what is smaller in magnitude than its expert's low or larger than its high, (T, *shape), bounds (T,)."""
    kept = keep_above(deltas, lows)
    for delta, high, out in zip(deltas, highs.tolist(), kept, strict=True):
        out -= torch.hardshrink(delta, high)
    return kept


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as rows: a matrix as it is, kernels by their first axis, anything less as one row."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)


def keep_in_rows(delta: torch.Tensor, density: float, largest: bool = True) -> torch.Tensor:
    """Keep the share of each row that is largest (or smallest) in magnitude, at least one entry, (*shape)."""
    rows = rows_of(delta)
    n_kept = count_kept(density, rows.shape[1])
    if not delta.numel() or n_kept >= rows.shape[1]:
        return delta.clone()
    places = rows.abs().topk(n_kept, dim=1, largest=largest, sorted=False).indices
    return torch.zeros_like(rows).scatter_(1, places, rows.gather(1, places)).reshape(delta.shape)


def row_ranks(delta: torch.Tensor) -> torch.Tensor:
    """Where each entry's magnitude stands in its row, from 0 for the smallest to 1; a row of one has one half."""
    rows = rows_of(delta)
    n = rows.shape[1]
    if n < 2:
        return torch.full_like(delta, 0.5)
    columns = torch.arange(n, device=delta.device)
    bits = rows.abs().view(torch.int32).long()  # in the order of the magnitudes; with the column below, none is equal
    order = bits.mul_(1 << 32).add_(columns).sort(dim=1).values.bitwise_and_((1 << 32) - 1)
    places = columns.to(delta.dtype).div_(n - 1)
    return torch.empty_like(rows).scatter_(1, order, places.expand_as(rows)).reshape(delta.shape)


def keep_n_of_m(delta: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the n largest in magnitude of every m entries in a row, and of r that are left over n r / m, rounded up."""
    flat = delta.flatten()
    whole = len(flat) // m * m
    blocks = keep_in_rows(flat[:whole].view(-1, m), n / m).flatten()
    left = flat[whole:]
    if len(left):
        left = keep_in_rows(left, math.ceil(n * len(left) / m) / len(left))
    return torch.cat([blocks, left]).reshape(delta.shape)


def drop(deltas: torch.Tensor, uniform: torch.Tensor, density: float | torch.Tensor, rescale: bool) -> torch.Tensor:
    """Keep each entry with probability `density` (its number is below it), divided by `density` to keep the mean."""
    mask = torch.sub(density, uniform).sign_().relu_()  # 1 where the number is below, 0 elsewhere
    kept = mask.mul_(deltas)
    return kept.div_(density) if rescale else kept


def norms(deltas: torch.Tensor) -> list[float]:
    """The L1 norm of each expert's part of a piece, (T,)."""
    return [summed(delta.abs()) for delta in deltas]


def l1_factors(found: Iterable[tuple[list[float], list[float]]]) -> torch.Tensor:
    """What gives each expert its L1 norm back, (T,) float32, from the pieces' norms before and after a trim.

    An expert of which nothing is left keeps its zeros.
    """
    before, after = zip(*found, strict=True)
    totals = [[math.fsum(own) for own in zip(*part, strict=True)] for part in (before, after)]
    return torch.tensor([old / new if new else 1.0 for old, new in zip(*totals, strict=True)])


def trim(deltas: torch.Tensor, numbers: torch.Tensor | None) -> torch.Tensor:
    """Trim by what a prepare pass has found: nothing, thresholds (T,), or thresholds and factors (2, T)."""
    if numbers is None:
        return deltas
    if numbers.dim() == 1:
        return keep_above(deltas, numbers)
    return keep_above(deltas, numbers[0]).mul_(spread(numbers[1], deltas))


def elect(deltas: torch.Tensor, weights: Sequence[float] | None, by: str) -> torch.Tensor:
    """The sign of each entry, -1, 0 or 1, (*shape): by the `mass` of the weighted deltas, or the `count` of signs."""
    if by == "mass":
        return add_up(deltas, weights).sign_()
    signs = None if weights is None else [math.copysign(weight != 0, weight) for weight in weights]
    return add_up(deltas.sign(), signs).sign_()


def agreeing(
    deltas: torch.Tensor, disjoint: str, weights: Sequence[float] | None = None, by: str = "mass"
) -> torch.Tensor:
    """Elect one sign for each entry, merge those that have it, (T, *shape) -> (*shape).

    Args:
        deltas: Task vectors, zero where an expert does not vote.
        disjoint: `mean` over the entries that agree, their `sum`, or the `max`, the largest of them in magnitude.
        weights: One for each expert: its entries are multiplied by it before the vote, and the mean is divided by the
            sum of the weights of those that agree. None for ones.
        by: Elects by `mass`, the sum of the deltas, or by `count`: one expert, one vote.
    """
    elected = elect(deltas, weights, by)
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


def tall_mask(delta: torch.Tensor, multi: torch.Tensor, scale: float) -> torch.Tensor:
    """1.0 where an expert's change is most of what the others leave, |delta| > scale * |multi - delta|, else 0.0.

    Args:
        delta: One task vector, (*shape).
        multi: The multi-task vector, (*shape).
        scale: The threshold's factor (lambda), at least 0; the larger, the fewer entries.
    """
    return (multi - delta).abs_().mul_(-scale).add_(delta.abs()).sign_().relu_()
