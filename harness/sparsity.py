"""How sparse a pruned model is: exact zeros of what comes out, counted as it is made, and never what was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from harness.inputs import Inputs, MergeError
from methods.kinds import Row, resolve


@dataclass(frozen=True)
class Zeros:
    """Counts over merged weights, in the dtype that they are kept in; buffers and what is not merged do not count."""

    pruned_zeros: int = 0  # in tensors that are pruned
    pruned: int = 0  # weights of these
    zeros: int = 0  # in all
    weights: int = 0

    @property
    def shares(self) -> tuple[float, float]:
        """Zeros in the tensors that are pruned, and in all, in [0, 1]."""
        return self.pruned_zeros / max(1, self.pruned), self.zeros / max(1, self.weights)

    def metrics(self) -> dict[str, float]:
        """As they are logged; nothing where nothing was counted."""
        if not self.weights:
            return {}
        own, whole = self.shares
        return {"prune/sparsity": own, "prune/sparsity_model": whole}

    def summary(self) -> list[tuple[str, str]]:
        """The same in words."""
        if not self.weights:
            return []
        own, whole = self.shares
        return [
            ("sparsity", f"{own:.4f} of {self.pruned:,} weights in pruned tensors are zero"),
            ("of the model", f"{whole:.4f} of {self.weights:,} merged weights"),
        ]


UNCOUNTED = Zeros()


def count_zeros(values: torch.Tensor, pruned: bool) -> Zeros:
    """The zeros of a merged tensor, or a part of it."""
    n = values.numel()
    found = n - int(torch.count_nonzero(values))
    return Zeros(found, n, found, n) if pruned else Zeros(0, 0, found, n)


def total(parts: Iterable[Zeros]) -> Zeros:
    """The sum of counts."""
    rows = [(part.pruned_zeros, part.pruned, part.zeros, part.weights) for part in parts]
    return Zeros(*map(sum, zip(*rows, strict=True))) if rows else UNCOUNTED


def prunes(row: Row, inputs: Inputs, name: str, params: Any) -> bool:
    """Whether the method prunes a tensor."""
    return resolve(row.prunes)(inputs.specs[name].shape, inputs.place(name), params)


def refuse_unprunable(row: Row, inputs: Inputs, params_of: Callable[[str], Any]) -> None:
    """Refuse models in which a method that prunes finds nothing to prune; no weight is read.

    Raises:
        MergeError: As above.
    """
    weights = [name for name in inputs.specs if inputs.is_weight(name)]
    if not row.prunes or any(prunes(row, inputs, name, params_of(name)) for name in weights):
        return
    shapes = [inputs.specs[name].shape for name in weights]
    sizes = f"{len(weights)} tensors with {sum(map(math.prod, shapes)):,} weights"
    raise MergeError(
        f"{row.name} prunes weights of linear layers in blocks, unless matrices says otherwise, and among the "
        f"{sizes} none is one; the first is {weights[0]}"
        if weights
        else f"{row.name}: there is no weight to prune"
    )
