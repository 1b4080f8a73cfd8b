"""One expert unchanged: the reference that every merge is measured by.

Source: none; the individual expert is the upper reference of every fusion paper.
Differs: nothing.
Formula: merged = expert_k
Cost: O(n) time, 2 chunks of memory; no other expert is read
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from methods.lazy import torch


@dataclass(frozen=True)
class ExpertParams:
    """Parameters of `expert`; also the schema of conf/method/expert.yaml."""

    expert: str = ""  # name of the expert in the pool; empty for the first


def members(params: ExpertParams, names: tuple[str, ...]) -> tuple[str, ...]:
    """The one expert that is read.

    Raises:
        ValueError: The pool has no expert of that name.
    """
    if not params.expert:
        return names[:1]
    if params.expert not in names:
        closest = difflib.get_close_matches(params.expert, names, n=1)
        hint = f"did you mean {closest[0]}?" if closest else f"there are {', '.join(names)}"
        raise ValueError(f"expert names none of the pool's experts, got {params.expert!r}; {hint}")
    return (params.expert,)


def expert(base: torch.Tensor | None, experts: torch.Tensor, params: ExpertParams) -> torch.Tensor:
    """The expert's tensor, (1, *shape) -> (*shape)."""
    return experts[0].clone()
