"""What compressions of experts share: the parameters that all have, one bit an entry, numbers in fewer bytes.

Source: none; bits are laid into bytes from the lowest on, as `numpy.packbits(bitorder="little")` has it.
Differs: nothing.
Formula: byte_j = sum_k 2**k * bit_(8 j + k), the last byte filled up with zeros
Cost: O(n) time, n bytes besides the n / 8 that come out
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from methods.kinds import Place
from methods.lazy import torch
from methods.parameters import Params, one_of, word

_DTYPES = ("float32", "float16", "bfloat16")
_WORDS = ("blocks", "linear", "all", "experts")


@dataclass(frozen=True)
class PackingParams(Params):
    """Parameters of every compression of experts."""

    expert: str | None = None  # the one expert to write, restored; null keeps all, packed
    dtype: str = word(*_DTYPES)  # of the numbers that are stored for each entry: float32, float16 or bfloat16


def position(expert: str | None, names: Sequence[str]) -> int:
    """Where an expert stands among the names.

    Raises:
        ValueError: None is named, or one that is not there.
    """
    known = ", ".join(names)
    if not expert:
        raise ValueError(f"expert=NAME says which of the compressed models is wanted; there are {known}")
    if expert not in names:
        closest = difflib.get_close_matches(expert, names, n=1)
        hint = f"did you mean {closest[0]}?" if closest else f"there are {known}"
        raise ValueError(f"expert names none of the pool's experts, got {expert!r}; {hint}")
    return list(names).index(expert)


def to_bits(masks: torch.Tensor) -> torch.Tensor:
    """Whether numbers are not zero, (T, *shape) -> (T, ceil(n / 8)) uint8 on the CPU.

    >>> to_bits(torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    tensor([[5],
            [0]], dtype=torch.uint8)
    """
    flat = masks.reshape(len(masks), math.prod(masks.shape[1:])).ne(0)
    return torch.from_numpy(np.packbits(flat.cpu().numpy(), axis=1, bitorder="little"))


def from_bits(bits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One expert's bits, (ceil(n / 8),) uint8, as ones and zeros of another tensor's shape, dtype and device.

    Raises:
        ValueError: There are not as many bytes as the shape needs.
    """
    n = like.numel()
    if bits.numel() != -(-n // 8):
        raise ValueError(f"{n} bits take {-(-n // 8)} bytes, got {bits.numel()}")
    found = np.unpackbits(bits.cpu().numpy(), count=n, bitorder="little")
    return torch.from_numpy(found).to(like).reshape(like.shape)


def stored(numbers: torch.Tensor, params: PackingParams) -> torch.Tensor:
    """Numbers in the dtype that they are kept in."""
    return numbers.to(getattr(torch, params.dtype))


def check_packed(matrices: str) -> None:
    """Refuse a word for `matrices` that is not known.

    Raises:
        ValueError: As above.
    """
    one_of("matrices", matrices, _WORDS)


def is_packed(shape: Sequence[int], place: Place, matrices: str) -> bool:
    """Whether a tensor is among those that a compression of matrices packs.

    Args:
        shape: Of the tensor.
        place: Where it stands.
        matrices: `blocks` takes weights of linear layers within the blocks (anywhere, where there are no blocks),
            `linear` those of all linear layers, `all` every two-dimensional tensor, `experts` those of mixtures only.
    """
    if len(shape) != 2 or matrices == "all":
        return len(shape) == 2
    if matrices == "experts":
        return place.linear and "experts" in place.name.split(".")
    inside = matrices == "linear" or not place.n_layers or 1 <= place.layer <= place.n_layers
    return place.linear and inside
