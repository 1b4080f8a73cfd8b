"""What searches of coefficients share: ask the objective, refuse a loss that is no number, remember the best."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from methods.lazy import torch


class Ledger:
    """An objective whose answers are counted, reported and compared."""

    def __init__(
        self,
        objective: Callable[..., tuple[float, torch.Tensor]],
        report: Callable[[int, float, torch.Tensor], None],
        advice: str,
    ) -> None:
        """Take what is minimised, what is told of each evaluation, and what may help where the loss is no number."""
        self._objective, self._report, self._advice = objective, report, advice
        self.n_asked, self.least = 0, math.inf
        self.best = torch.empty(0)

    def __call__(self, coefficients: torch.Tensor, penalty: float = 0.0, **how: Any) -> tuple[float, torch.Tensor]:
        """Loss and gradient of coefficients, (groups, T), from the objective, which is told `how` as well.

        Args:
            coefficients: They are remembered if no loss was lower before.
            penalty: What the method itself adds to the loss.
            how: What the objective is told besides.

        Raises:
            FloatingPointError: The loss is no number; the message names the step and the coefficients.
        """
        loss, gradient = self._objective(coefficients, **how)
        loss += penalty
        if not math.isfinite(loss):
            values = ", ".join(f"{value:.4g}" for value in coefficients.flatten()[:8].tolist())
            raise FloatingPointError(
                f"the loss is {loss} at step {self.n_asked}, where the coefficients are {values}"
                f"{', ...' if coefficients.numel() > 8 else ''}; {self._advice}"
            )
        self._report(self.n_asked, loss, coefficients.clone())
        self.n_asked += 1
        if loss < self.least:
            self.least, self.best = loss, coefficients.clone()
        return loss, gradient
