"""How tensors are read: part by part, as float32, into memory of the reader's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeGuard, runtime_checkable

import torch


@runtime_checkable
class Source(Protocol):
    """A mapping of names to tensors that reads them from somewhere when they are asked for.

    It is a `Mapping[str, torch.Tensor]` besides; what is here is what makes it lazy. A source that is made out of
    others (a LoRA expert, layers restacked, a vocabulary remapped) implements the same.
    """

    @property
    def source(self) -> str:
        """What the user called it."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape, from headers."""
        ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Name -> dtype, from headers: what a merged tensor is written as, where this source is the reference."""
        ...

    @property
    def nbytes(self) -> int:
        """Size of what is read for all tensors together."""
        ...

    @property
    def fingerprint(self) -> str:
        """Content hash of all that the tensors depend on."""
        ...

    @property
    def stamp(self) -> str:
        """What changes when a file that the tensors come from is changed; found without reading weights."""
        ...

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read elements [start, start + len(out)) of the flattened tensor into `out`.

        `out` is 1-D contiguous float32 on the CPU. May be called from several threads at once.
        """
        ...


def is_source(tensors: object) -> TypeGuard[Source]:
    """Whether a mapping reads lazily; `isinstance` would ask for its fingerprint (Python 3.11) and so read it all."""
    return hasattr(tensors, "read")


def read_into(tensors: Mapping[str, torch.Tensor], name: str, start: int, out: torch.Tensor) -> None:
    """`Source.read` of any mapping: one that is no source holds its tensors in memory."""
    if is_source(tensors):
        tensors.read(name, start, out)
    else:
        out.copy_(tensors[name].detach().reshape(-1)[start : start + len(out)])
