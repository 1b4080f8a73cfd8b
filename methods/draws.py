"""Random numbers addressed by where they are used: (seed, tensor name, expert, position), nothing else.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox, counter-based), as NumPy has it.
Sixteen bits each are had in a third of the time of a full float; small numbers get sixteen more.
The same bits come out whatever the order, the chunk size, the number of processes or the hash seed.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np

from methods.lazy import torch

if TYPE_CHECKING:
    from methods.kinds import Draw

_STEPS = 1 << 16
_SMALL = _STEPS // 64  # numbers below 1/64 get more bits, lest a small probability be rounded by much of itself
_PER_COUNTER = 16  # numbers of 16 bits from one step of Philox 4x64


def drawer(
    seed: int, name: str, experts: tuple[str, ...], shape: tuple[int, ...], offset: int, device: torch.device
) -> Draw:
    """A `Draw` for one piece of a tensor: expert's index -> uniform numbers in [0, 1), (*shape) float32.

    They are multiples of 2**-16, and of 2**-32 below 1/64: a probability is met to one part in a thousand.

    Args:
        seed: The run's seed.
        name: The tensor's name.
        experts: Names of the experts, in the order of the stack.
        shape: The piece's shape.
        offset: Position of the piece's first element in the flattened tensor; a multiple of 16.
        device: Where the numbers are wanted.
    """

    def draw(index: int) -> torch.Tensor:
        key = hashlib.blake2b(f"{seed}\0{name}\0{experts[index]}".encode(), digest_size=16).digest()
        stream = np.random.Philox(key=int.from_bytes(key, "little"))
        stream.advance(offset // _PER_COUNTER)
        n = math.prod(shape)
        words = stream.random_raw(-(-n // 4)).astype("<u8", copy=False).view("<u2")[:n]
        numbers = words.astype(np.float32)
        small = np.flatnonzero(words < _SMALL)
        numbers[small] += _fractions(int.from_bytes(key[:8], "little"), offset + small)
        numbers *= np.float32(1 / _STEPS)
        return torch.from_numpy(numbers).to(device).reshape(shape)

    return draw


def _fractions(key: int, positions: np.ndarray) -> np.ndarray:
    """Sixteen bits more for some positions, as fractions in [0, 1): SplitMix64 (Steele et al. 2014) of the position."""
    mixed = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(48)).astype(np.float32) / np.float32(_STEPS)
