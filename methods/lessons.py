"""What a build is taught by: its own loss on the inputs of each expert's task, and how the tasks count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from methods.lazy import torch


class Lesson:
    """The part of training that a method knows; a build carries one as `lesson`, and the harness feeds it."""

    def begin(self, module: Any, generator: torch.Generator) -> None:
        """Called before each step, with where random numbers come from."""

    def loss(self, module: Any, task: int, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What is minimised on inputs of an expert's own task, where that is no loss of predictions.

        Args:
            module: The build.
            task: The expert's index.
            inputs: Of B examples, as the pool feeds them.

        Returns:
            Each example's, (B,).
        """
        raise NotImplementedError

    def weigh(self, losses: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """How much each task counts in a step, (T,), from losses (T,) and gradients (T, n): by default all the same."""
        return torch.ones_like(losses)

    def finish(self, module: Any) -> None:
        """Called after the last step, and by who builds what has been taught already."""
