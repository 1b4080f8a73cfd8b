"""Random numbers addressed by where they are used: (seed, tensor name, expert, position), nothing else.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox, counter-based), as NumPy has it.
Sixteen bits each are enough to compare with a probability, and are had in a third of the time of a full float.
The same bits come out whatever the order, the chunk size, the number of processes or the hash seed.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np

from methods.lazy import torch
from methods.primitives import STEPS

if TYPE_CHECKING:
    from methods.kinds import Draw

_PER_COUNTER = 16  # numbers of 16 bits from one step of Philox 4x64


def drawer(
    seed: int, name: str, experts: tuple[str, ...], shape: tuple[int, ...], offset: int, device: torch.device
) -> Draw:
    """A `Draw` for one piece of a tensor: expert's index -> uniform multiples of 2**-16 in [0, 1), (*shape) float32.

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
        words = stream.random_raw(-(-n // 4)).astype("<u8", copy=False)
        numbers = words.view("<u2")[:n].astype(np.float32)
        numbers *= np.float32(1 / STEPS)
        return torch.from_numpy(numbers).to(device).reshape(shape)

    return draw
