"""The k-th largest magnitude over a whole model, exact, in linear time and constant memory.

Source: the order of non-negative IEEE floats is the order of their bits, so a histogram of the upper half of the bits
finds the bin, and one of the lower half within that bin finds the number (radix selection).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from methods.lazy import torch

_HALF = 16
_BINS = 1 << _HALF


def count_kept(density: float, n: int) -> int:
    """How many of n entries a density keeps: rounded down, at least one.

    >>> count_kept(0.2, 22016), count_kept(0.01, 3)
    (4403, 1)
    """
    return max(1, int(density * n + 1e-6))  # the little something undoes 0.29 * 100 = 28.999...


def kth_largest(walk: Callable[[], Iterable[torch.Tensor]], density: float) -> torch.Tensor:
    """Magnitude of the last entry that each expert keeps, over everything that the walk yields.

    Args:
        walk: Starts a fresh walk over pieces (T, ...), float32 and finite; it is walked twice.
        density: Share kept, in (0, 1].

    Returns:
        Thresholds, (T,) float32: exactly `count_kept` entries are at least as large, ties aside.
    """
    upper = _histogram(walk, lambda bits: bits >> _HALF)
    n = int(upper[0].sum())
    wanted = torch.full((len(upper),), count_kept(density, n), dtype=torch.int64)
    bins, left = _locate(upper, wanted)
    lower = _histogram(walk, lambda bits: bits & (_BINS - 1), bins)
    ends, _ = _locate(lower, left)
    return ((bins << _HALF) | ends).to(torch.int32).view(torch.float32)


def _histogram(
    walk: Callable[[], Iterable[torch.Tensor]],
    key: Callable[[torch.Tensor], torch.Tensor],
    bins: torch.Tensor | None = None,
) -> torch.Tensor:
    """Counts (T, bins) of a key of the bits, over the entries whose upper half is in the expert's bin."""
    counts: list[torch.Tensor] = []
    for piece in walk():
        for index, values in enumerate(piece):
            bits = values.abs().flatten().view(torch.int32)
            if bins is not None:
                bits = bits[(bits >> _HALF) == bins[index].to(bits.device)]
            counted = torch.bincount(key(bits), minlength=_BINS).cpu()
            if index < len(counts):
                counts[index] += counted
            else:
                counts.append(counted)
    return torch.stack(counts)


def _locate(counts: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bin in which the wanted-th largest lies, (T,), and how many of that bin are still wanted, (T,)."""
    above = counts.flip(1).cumsum(1)  # how many lie in this bin or a higher one
    position = (above < wanted[:, None]).sum(1)
    higher = above.gather(1, (position - 1).clamp(min=0)[:, None]).squeeze(1) * (position > 0)
    return counts.shape[1] - 1 - position, wanted - higher
