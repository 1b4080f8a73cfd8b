"""Tensors in another dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from pools.picked import Tensors


class Recast(Mapping[str, torch.Tensor]):
    """Tensors in another dtype where they are floating, converted one at a time as they are asked for."""

    def __init__(self, tensors: Tensors, dtype: torch.dtype | None) -> None:
        self._tensors, self._dtype = tensors, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor

    @property
    def stamp(self) -> str | None:
        """What changes when the tensors do; None where nobody can tell, see `pools.reading.Source`."""
        return getattr(self._tensors, "stamp", None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
