"""Base and experts in float32 on a device, kept for many merges, with what merges can share: nothing is read twice.

What a prepare pass finds (thresholds, say) is kept by all that it depends on; what it can be had from for any value
(`Row.kept`: sorted magnitudes) is made once; random numbers are drawn once for each seed.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil
import torch

from harness.inputs import Inputs
from methods.draws import drawer
from methods.kinds import Row
from pools.reading import read_into

if TYPE_CHECKING:
    from methods.kinds import Draw

SHARE = 0.5  # of the memory that is free: most that is held
DRAWS_BYTES = 2 << 30  # of random numbers
KEPT_BYTES = 4 << 30  # of what a row keeps


@dataclass
class Held:
    """Weights of a pool, flat: name -> base (n,) and experts (T, n)."""

    experts: tuple[str, ...]
    base: dict[str, torch.Tensor]
    stacked: dict[str, torch.Tensor]
    device: torch.device
    _numbers: dict[Any, Any] = field(default_factory=dict)
    _made: dict[str, Any] = field(default_factory=dict)
    _draws: dict[Any, torch.Tensor] = field(default_factory=dict)
    _drawn_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(tensor.nbytes for part in (self.base, self.stacked) for tensor in part.values())

    def holds(self, experts: tuple[str, ...], name: str) -> bool:
        """Whether a tensor of just these experts is here."""
        return experts == self.experts and name in self.stacked

    def numbers(self, row: Row, params: Any, seed: int, compute: Callable[[], Any], around: Sequence[Any] = ()) -> Any:
        """What the prepare pass finds, from before if nothing that it reads has changed."""
        own = tuple(
            (item.name, repr(getattr(params, item.name)))
            for item in dataclasses.fields(params)
            if item.name not in row.unread
        )
        key = (row.name, own, seed if row.random else None, repr(around))  # veneers change what the pass sees
        if key not in self._numbers:
            self._numbers[key] = compute()
        return self._numbers[key]

    def made(self, row: Row, make: Callable[[], Any]) -> Any:
        """What `Row.kept` makes, or None where it would be too large."""
        if not row.kept or sum(tensor.nbytes for tensor in self.stacked.values()) > KEPT_BYTES:
            return None
        if row.kept not in self._made:
            self._made[row.kept] = make()
        return self._made[row.kept]

    def draw(self, seed: int, name: str, shape: tuple[int, ...], start: int) -> Draw:
        """As `methods.draws.drawer`, each number drawn once."""
        fresh = drawer(seed, name, self.experts, shape, start, self.device)

        def draw(index: int) -> torch.Tensor:
            key = (seed, name, index, start, shape)
            found = self._draws.get(key)
            if found is None:
                found = fresh(index)
                with self._lock:
                    if self._drawn_bytes + found.nbytes <= DRAWS_BYTES:
                        self._draws[key] = found
                        self._drawn_bytes += found.nbytes
            return found

        return draw


def hold(inputs: Inputs, processes: int = 1) -> Held | None:
    """Read all weights once; None where they would take more than `SHARE` of the free memory of this process.

    Args:
        inputs: Base and experts.
        processes: How many there are that do the same on this machine.
    """
    names = list(filter(inputs.is_weight, inputs.specs))
    sizes = {name: math.prod(inputs.specs[name].shape) for name in names}
    members = len(inputs.experts) + (inputs.base is not None)
    if 4 * members * sum(sizes.values()) > SHARE * _free(inputs.device) / processes:
        return None
    base: dict[str, torch.Tensor] = {}
    stacked: dict[str, torch.Tensor] = {}
    for name in names:
        rows = torch.empty(len(inputs.experts), sizes[name])
        for row, tensors in zip(rows, inputs.experts.values(), strict=True):
            read_into(tensors, name, 0, row)
        stacked[name] = rows.to(inputs.device)
        if inputs.base is not None:
            own = torch.empty(sizes[name])
            read_into(inputs.base, name, 0, own)
            base[name] = own.to(inputs.device)
    return Held(tuple(inputs.experts), base, stacked, inputs.device)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
