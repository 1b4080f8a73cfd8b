"""A merge as it is asked for, where its tensors go, and what it came to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from harness.inputs import Inputs
from harness.sparsity import UNCOUNTED, Zeros
from harness.veneers import Dress, Worn, undressed
from methods.kinds import Base, Row
from pools.faults import Spec, recast, specs_of

Tick = Callable[[str, int], None]  # (phase, bytes read)


class Sink(Protocol):
    """Where merged tensors go, in any order and from several threads."""

    def in_order(self) -> Sequence[str]:
        """The names that are wanted, in the order in which they are best made."""
        ...

    def put_part(self, name: str, start: int, part: torch.Tensor) -> None:
        """Take elements [start, start + len(part)) of a tensor, 1-D on the CPU, in the dtype it will have."""
        ...


class Memory:
    """A sink that keeps the merged tensors."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self.tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}

    def in_order(self) -> Sequence[str]:
        """All names."""
        return list(self.tensors)

    def put_part(self, name: str, start: int, part: torch.Tensor) -> None:
        """Copy a part into its place."""
        self.tensors[name].view(-1)[start : start + len(part)] = part


@dataclass(frozen=True)
class Merge:
    """A merge that is ready to be done."""

    row: Row
    params: Any
    inputs: Inputs
    params_of: Callable[[str], Any] | None = None  # for each tensor's name, where parameters differ
    veneers: tuple[Worn, ...] = ()  # around the rule, the first innermost
    dress: Dress = undressed  # what the veneers make of a piece; known once they have looked at the model

    @functools.cached_property
    def specs(self) -> dict[str, Spec]:
        """Names, shapes and dtypes of what comes out."""
        return recast(self.inputs.specs, self.inputs.dtype)

    def of(self, name: str) -> Any:
        """The parameters for a tensor."""
        return self.params_of(name) if self.params_of else self.params

    @functools.cached_property
    def width(self) -> dict[str, int]:
        """Bytes that are read for one element of each tensor."""
        members = [specs_of(tensors) for tensors in self.inputs.experts.values()]
        if self.inputs.base is not None and self.row.base is not Base.unused:
            members.append(specs_of(self.inputs.base))
        return {name: sum(member[name].dtype.itemsize for member in members) for name in self.inputs.specs}


@dataclass(frozen=True)
class Done:
    """What a merge, or a part of it, came to."""

    bytes_read: int = 0
    bytes_written: int = 0
    error: float = 0.0  # sum of squared differences that rounding to the output's dtype has made
    square: float = 0.0  # sum of squares of the merged weights
    zeros: Zeros = UNCOUNTED  # of a method that prunes
    seconds: Mapping[str, float] | None = None  # by phase: prepare, merge

    @property
    def rounding_error(self) -> float:
        """What rounding changed, relative to the merged weights: ||rounded - merged|| / ||merged||."""
        return math.sqrt(self.error / self.square) if self.square else 0.0

    def summary(self) -> list[tuple[str, str]]:
        """The figures in words."""
        seconds = sum((self.seconds or {}).values())
        rate = (self.bytes_read + self.bytes_written) / max(seconds, 1e-9)
        phases = ", ".join(f"{phase} {value:.2f} s" for phase, value in (self.seconds or {}).items())
        return [
            ("read", sized(self.bytes_read)),
            ("written", sized(self.bytes_written)),
            ("time", phases),
            ("rate", f"{sized(rate)}/s"),
            ("rounding error", f"{self.rounding_error:.2e}, relative"),
            *self.zeros.summary(),
        ]


def sized(nbytes: float) -> str:
    """Bytes in a handy unit.

    >>> sized(2_200_000_000), sized(512)
    ('2.05 GiB', '512 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} TiB"
