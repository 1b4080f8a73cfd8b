"""The nearest point of a simplex: weights that are not negative and sum to one, or to one at most.

Source: Held, Wolfe & Crowder 1974; by sorting: Duchi et al. 2008, "Efficient projections onto the l1-ball", Figure 1.
"""

from __future__ import annotations

from methods.lazy import torch


def onto_simplex(points: torch.Tensor, capped: bool = False) -> torch.Tensor:
    """Project each row, (..., K) -> (..., K).

    Args:
        points: Any finite numbers.
        capped: A sum below one is allowed too.

    >>> onto_simplex(torch.tensor([0.75, 0.75, -1.0]))
    tensor([0.5000, 0.5000, 0.0000])
    >>> onto_simplex(torch.tensor([0.25, 0.5, -1.0]), capped=True)
    tensor([0.2500, 0.5000, 0.0000])
    """
    ordered = points.sort(dim=-1, descending=True).values
    places = torch.arange(1, points.shape[-1] + 1, dtype=points.dtype, device=points.device)
    levels = (ordered.cumsum(-1) - 1) / places  # what is taken off, were so many of the largest to stay positive
    n_positive = (ordered > levels).sum(-1, keepdim=True)
    level = levels.gather(-1, n_positive - 1)
    if capped:
        level = torch.where(points.clamp(min=0).sum(-1, keepdim=True) <= 1, 0, level)
    return (points - level).clamp_(min=0)
