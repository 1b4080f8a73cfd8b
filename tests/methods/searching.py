"""Losses of coefficients with a known minimum, and a search that is written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Reports = list[tuple[int, float, torch.Tensor]]

INSIDE = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.0, 0.5]])  # (groups, T), each row in the hull of the experts


def quadratic(target: torch.Tensor) -> Callable[..., tuple[float, torch.Tensor]]:
    """A loss that is zero at the target, and its gradient."""

    def objective(coefficients: torch.Tensor, **how: Any) -> tuple[float, torch.Tensor]:
        away = coefficients - target
        return float(away.square().sum()), 2 * away

    return objective


def searched(method: Any, shape: tuple[int, int], objective: Any, params: Any, **extras: Any) -> tuple[Any, Reports]:
    """The coefficients found, and what was reported."""
    reports: Reports = []
    found = method(shape, objective, params, lambda *told: reports.append(told), **extras)
    return found, reports
