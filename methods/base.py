"""The base model unchanged: the reference that every merge must beat.

Source: none; the lower reference of every fusion paper.
Differs: nothing.
Formula: merged = base
Cost: O(n) time, 2 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch


@dataclass(frozen=True)
class BaseParams:
    """`base` has no parameters."""


def members(params: BaseParams, names: tuple[str, ...]) -> tuple[str, ...]:
    """No expert is read."""
    return ()


def base(base: torch.Tensor, experts: torch.Tensor, params: BaseParams) -> torch.Tensor:
    """The base's tensor, (*shape) -> (*shape)."""
    return base.clone()
