"""What is known of an adapter while it is made: its modules' factors, and what cutting them down has lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.inputs import MergeError
from methods.low_rank import LowRank, check_rank
from pools.adapter_files import Module
from pools.faults import Spec


@dataclass
class Found:
    """What is known of an adapter that is being made; workers add to it."""

    modules: dict[str, Module] = field(default_factory=dict)  # by the weight's name
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)  # (of the change, of what was lost)

    def add(self, name: str, path: str, kind: str, shape: tuple[int, ...], made: LowRank) -> None:
        """Take the change of one weight; one that is zero is left out."""
        self.squares[name] = (made.square, made.lost)
        if made.square > 0:
            self.modules[name] = Module(path, made.left, made.right, kind, shape)

    def facts(self) -> dict[str, Any]:
        """What can be told of it."""
        ranks = [module.rank for module in self.modules.values()]
        errors = {name: math.sqrt(lost / square) for name, (square, lost) in self.squares.items() if square}
        square, lost = (
            (math.fsum(column) for column in zip(*self.squares.values(), strict=True)) if errors else (0.0, 0.0)
        )
        return {
            "modules": len(self.modules),
            "rank_min": min(ranks, default=0),
            "rank_max": max(ranks, default=0),
            "parameters": sum(module.left.numel() + module.right.numel() for module in self.modules.values()),
            "relative_error": math.sqrt(lost / square) if square else 0.0,
            "relative_errors": dict(sorted(errors.items(), key=lambda item: -item[1])),
            "whole_tensors": sorted(self.whole),
        }


def checked(rank: int | None, energy: float | None, needed: bool = False) -> None:
    """Refuse a rank or an energy out of range, both at once, and neither where one is needed.

    Raises:
        MergeError: As above.
    """
    try:
        check_rank(rank, energy, needed)
    except ValueError as error:
        raise MergeError(str(error)) from error


def module_paths(specs: Mapping[str, Spec]) -> set[str]:
    """Modules that have tensors of their own."""
    return {name.rpartition(".")[0] for name in specs}
