"""The k-th largest magnitude over a whole model, exact, in linear time and bounded memory.

Source: the order of non-negative IEEE floats is the order of their bits. A sample brackets the number; one walk counts
what lies above the bracket and collects what lies within; where that is too much to keep, in a histogram of the bits
(radix selection on the one bucket that matters). Where the sample has misled, or a bin holds several numbers, further
walks narrow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from methods.lazy import torch

_SAMPLED = 4096  # elements of each piece that are looked at for the bracket
_SAMPLES = 1 << 20  # most samples that are kept for each expert
_BINS = 1 << 20  # of the histogram
_BATCH = 1 << 20  # most numbers that are kept for each expert
_QUEUE = 4  # pieces' numbers that are kept whatever they are
_NEXT = 0.05  # share of the sample that the bracket after a missed one spans
_END = 0x7FFF_FFFF  # above the bits of every magnitude


class Walk(Protocol):
    """Starts a fresh walk: the function's result for each piece (T, ...), float32, in order."""

    def __call__(self, function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Iterable[Any]:
        """Walk; with a limit over the first so many elements of each piece."""
        ...


def count_kept(density: float, n: int) -> int:
    """How many of n entries a density keeps: rounded down, at least one.

    >>> count_kept(0.2, 22016), count_kept(0.01, 3)
    (4403, 1)
    """
    return max(1, int(density * n + 1e-6))  # the little something undoes 0.29 * 100 = 28.999...


def kth_largest(
    walk: Walk, density: float | Sequence[float], counted: Callable[[float, int], int] = count_kept
) -> torch.Tensor:
    """Magnitude of the last entry that each expert keeps, over everything that the walk yields.

    Args:
        walk: Over pieces (T, ...); it is walked two times, seldom more.
        density: Share kept, in (0, 1], of all experts or of each.
        counted: How many of n entries a density keeps, at least one.

    Returns:
        Thresholds, (T,) float32: exactly `counted` entries are at least as large, ties aside.
    """
    samples = _sampled(walk)
    shares = [density] * len(samples) if isinstance(density, int | float) else list(density)
    if len(shares) != len(samples):
        raise ValueError(f"densities lists {len(shares)} numbers for {len(samples)} experts; give one for each")
    brackets = [_bracket(*found) for found in zip(samples, shares, strict=True)]
    while any(bracket.end - bracket.start > 1 for bracket in brackets):
        found = zip(brackets, _counted(walk, brackets), shares, samples, strict=True)
        brackets = [
            _narrowed(bracket, count, counted(share, count.n), np.concatenate(own))
            for bracket, count, share, own in found
        ]
    return torch.tensor([bracket.start for bracket in brackets], dtype=torch.int32).view(torch.float32)


@dataclass(frozen=True)
class _Bracket:
    """Bits [start, end) in which the wanted number is looked for; bins of 2**shift bits."""

    start: int
    end: int

    @property
    def shift(self) -> int:
        return max(0, math.ceil(math.log2((self.end - self.start) / _BINS)))


@dataclass
class _Counts:
    """What one walk found for one expert."""

    n: int = 0
    above: int = 0  # at or beyond the bracket's end
    bins: np.ndarray | None = None  # within, once they are too many to keep
    kept: list[np.ndarray] = field(default_factory=list)  # not yet in the bins: bits less the bracket's start


def _bits(values: torch.Tensor) -> np.ndarray:
    """Bits of the magnitudes, (n,) int32, in memory of their own."""
    return values.abs().flatten().cpu().view(torch.int32).numpy()


def _sampled(walk: Walk) -> list[list[np.ndarray]]:
    """A share of the magnitudes of each expert, as bits, piece by piece."""
    kept: list[list[np.ndarray]] = []
    n, step = 0, 1  # how many are kept, and of how many one is: the same share of early and of late pieces
    for found in walk(lambda piece: [_bits(values) for values in piece], _SAMPLED):
        kept = kept or [[] for _ in found]
        for own, bits in zip(kept, found, strict=True):
            own.append(bits[::step].copy())  # a view would hold all of them
        n += len(kept[0][-1])
        if n > 2 * _SAMPLES:
            kept = [[bits[::2].copy() for bits in own] for own in kept]
            n, step = sum(map(len, kept[0])), 2 * step
    return kept


def _bracket(pieces: list[np.ndarray], density: float) -> _Bracket:
    """Bits between which the number almost surely lies, by the order of the sample and how much its pieces differ."""
    samples = np.concatenate(pieces)
    if not len(samples):
        return _Bracket(0, 1)  # nothing to choose from
    last = len(samples) - 1
    middle = np.partition(samples, round((1 - density) * last))[round((1 - density) * last)]
    strays = [np.count_nonzero(piece >= middle) - density * len(piece) for piece in pieces]
    margin = 0.003 + 5 * math.sqrt(math.fsum(stray * stray for stray in strays)) / len(samples)
    low, high = math.floor((1 - density - margin) * last), math.ceil((1 - density + margin) * last)
    ordered = np.partition(samples, [max(low, 0), min(high, last)])
    start = int(ordered[low]) if low > 0 else 0
    end = int(ordered[high]) + 1 if high < last else _END
    return _Bracket(start, max(end, start + 2))  # of one number it would be taken for certain, and it is a sample's


def _counted(walk: Walk, brackets: list[_Bracket]) -> list[_Counts]:
    """One walk: counts above and within each expert's bracket."""

    def look(piece: torch.Tensor) -> list[tuple[int, int, np.ndarray]]:
        return [_looked(_bits(values), bracket) for values, bracket in zip(piece, brackets, strict=True)]

    counts = [_Counts() for _ in brackets]
    for found in walk(look):
        for count, bracket, (n, above, inside) in zip(counts, brackets, found, strict=True):
            count.n += n
            count.above += above
            count.kept.append(inside)
            if len(count.kept) > _QUEUE and sum(map(len, count.kept)) > _BATCH:
                _bin(count, bracket)
    return counts


def _looked(bits: np.ndarray, bracket: _Bracket) -> tuple[int, int, np.ndarray]:
    """How many there are, how many lie above the bracket, and the bits of those within, less its start."""
    bits -= np.int32(bracket.start)
    width = bracket.end - bracket.start
    return len(bits), int(np.count_nonzero(bits >= width)), bits[bits.view(np.uint32) < np.uint32(width)]


def _bin(count: _Counts, bracket: _Bracket) -> None:
    """Move what is kept into the histogram."""
    if count.bins is None:
        count.bins = np.zeros(((bracket.end - bracket.start - 1) >> bracket.shift) + 1, dtype=np.int64)
    count.bins += np.bincount(np.concatenate(count.kept) >> bracket.shift, minlength=len(count.bins))
    count.kept.clear()


def _below(bracket: _Bracket, samples: np.ndarray) -> _Bracket:
    """Where to look after a bracket that lay too high: the next share of the sample, or all that is left."""
    lower = np.sort(samples[samples < bracket.start])
    position = len(lower) - int(_NEXT * len(samples)) - 1
    return _Bracket(int(lower[position]) if position > 0 else 0, bracket.start)


def _above(bracket: _Bracket, samples: np.ndarray) -> _Bracket:
    """Where to look after a bracket that lay too low."""
    higher = np.sort(samples[samples >= bracket.end])
    position = int(_NEXT * len(samples))
    return _Bracket(bracket.end, int(higher[position]) + 1 if position < len(higher) - 1 else _END)


def _narrowed(bracket: _Bracket, count: _Counts, n_kept: int, samples: np.ndarray) -> _Bracket:
    """The bin in which the wanted number lies, or what is left beside a bracket that missed it."""
    if bracket.end - bracket.start == 1:
        return bracket
    wanted = n_kept - count.above  # the how-many-th largest within
    if wanted <= 0:
        return _above(bracket, samples)
    if count.bins is None:
        values = np.concatenate(count.kept)
        if wanted > len(values):
            return _below(bracket, samples)
        start = bracket.start + int(np.partition(values, len(values) - wanted)[len(values) - wanted])
        return _Bracket(start, start + 1)
    if count.kept:
        _bin(count, bracket)
    from_above = count.bins[::-1].cumsum()  # how many lie in this bin or higher
    if wanted > from_above[-1]:
        return _below(bracket, samples)
    position = len(count.bins) - 1 - int(np.searchsorted(from_above, wanted))
    start = bracket.start + (position << bracket.shift)
    return _Bracket(start, min(start + (1 << bracket.shift), bracket.end))
