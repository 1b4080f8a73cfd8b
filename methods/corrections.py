"""A model whose representations are corrected for the task that it is told, and how that is taught."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from methods.lessons import Lesson
from methods.mixtures import Made


class Correction(nn.Module):
    """What one place of a model is corrected by: h - up relu(down h), of the task that is set."""

    def __init__(self, width: int, rank: int, n_tasks: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(n_tasks, rank, width))
        self.up = nn.Parameter(torch.zeros(n_tasks, width, rank))
        nn.init.normal_(self.down, std=width**-0.5)
        self.task: int | None = None
        self.seen: torch.Tensor | None = None  # what came out last

    def see(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A forward hook: the output, or the first of its parts, corrected."""
        hidden = output[0] if isinstance(output, tuple) else output  # (B, ..., width)
        if self.task is not None:
            hidden = hidden - torch.relu(hidden @ self.down[self.task].T) @ self.up[self.task].T
        self.seen = hidden if torch.is_grad_enabled() else None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class Operated(Made):
    """A merged model, corrected at some places for the task that it is told by `of`."""

    def __init__(
        self,
        body: nn.Module,
        experts: Sequence[nn.Module],
        places: Sequence[str],
        width_at: Callable[[str], int],
        rank: int,
        names: Sequence[str],
        is_causal: Callable[[str], bool],
    ) -> None:
        """Put corrections that do nothing yet behind the modules at `places`; only they are trainable."""
        super().__init__()
        self.body, self.names = body.requires_grad_(False), tuple(names)
        made = [Correction(width_at(place), rank, len(experts)) for place in places]
        self.corrections: Any = nn.ModuleList(made)
        for place, correction in zip(places, made, strict=True):
            body.get_submodule(place).register_forward_hook(correction.see)
        self.lesson = Alignment(experts, places, [is_causal(place) for place in places])

    def headed(self) -> list[Any]:
        """The one model."""
        return [self.body]

    def of(self, task: str | None) -> Operated:
        """Itself, corrected for a task from now on; None for no correction.

        Raises:
            ValueError: No expert is called so.
        """
        if task is not None and task not in self.names:
            raise ValueError(f"corrections are there for {', '.join(self.names)}; got {task!r}")
        for correction in self.corrections:
            correction.task = None if task is None else self.names.index(task)
        return self

    def forward(self, **inputs: Any) -> Any:
        """What the merged model makes of the inputs, corrected."""
        return self.body(**inputs)

    def generate(self, **inputs: Any) -> torch.Tensor:
        """As the merged model does."""
        return self.body.generate(**inputs)  # type: ignore[operator]


class Alignment(Lesson):
    """The distance between corrected representations and those of each task's expert."""

    def __init__(self, experts: Sequence[nn.Module], places: Sequence[str], causal: Sequence[bool]) -> None:
        self.experts, self.places, self.causal = list(experts), list(places), list(causal)

    def loss(self, module: Any, task: int, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The mean distance of each example over what is no padding, summed over places, (B,)."""
        expert = self.experts[task].to(module.device)
        wanted: list[torch.Tensor] = []

        def see(own: nn.Module, args: Any, output: Any) -> None:
            wanted.append(output[0] if isinstance(output, tuple) else output)

        handles = [expert.get_submodule(place).register_forward_hook(see) for place in self.places]
        try:
            with torch.no_grad():
                expert(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        module.of(module.names[task])(**inputs)
        pairs = zip(module.corrections, wanted, self.causal, strict=True)
        return torch.stack(
            [_distance(correction.seen, other, _read(inputs, causal)) for correction, other, causal in pairs]
        ).sum(0)

    def finish(self, module: Any) -> None:
        """Let the experts go."""
        self.experts = []
        module.of(None)
        for correction in module.corrections:
            correction.seen = None


def _read(inputs: Mapping[str, Any], causal: bool) -> torch.Tensor | None:
    """Which tokens are no padding, (B, N), of a decoder those of the answers; None where nothing says so."""
    if causal and "labels" in inputs:
        return inputs["labels"] >= 0
    return inputs.get("attention_mask")


def _distance(one: torch.Tensor, other: torch.Tensor, read: torch.Tensor | None) -> torch.Tensor:
    """The mean of |one - other| of each example, (B, ..., D) -> (B,), over tokens that are read."""
    apart = (one - other).abs().flatten(2).mean(-1) if one.dim() > 2 else (one - other).abs().mean(-1, keepdim=True)
    counts = torch.ones_like(apart)
    if read is not None and one.dim() > 2 and read.shape == apart.shape:
        counts = read.to(apart)
    return (apart * counts).sum(1) / counts.sum(1).clamp(min=1)
