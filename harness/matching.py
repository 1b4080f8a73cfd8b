"""Losses over all examples at every step, for methods that learn of few; and the distance from the experts' answers.

What a module shows on the way is seen by hooks on its blocks. Blocks are found by their depth, as pools find it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from harness.config import UserError
from harness.evaluate import IGNORED
from harness.examples import Examples, Texts
from harness.execute import own_share
from harness.losses import Chosen, Forward, Losses, Shells
from methods.kinds import Stack
from methods.parameters import per_expert
from pools.roles import depths

KEPT_BYTES = 2 << 30  # of what experts have shown; what does not fit is shown again at each step


class Whole(Losses):
    """All examples of every task a call, `batch_size` of a task at a time."""

    def __init__(
        self, fabric: Fabric, tasks: Mapping[str, Examples | Texts], batch_size: int, seed: int, kind: str
    ) -> None:
        super().__init__(fabric, tasks, batch_size, seed, kind)
        self._joins, self._size = False, batch_size

    def _next(self) -> list[Chosen]:
        self.drawn += 1
        found = []
        for task, examples in self.tasks.items():
            n = len(examples)
            for start in range(0, n, self._size):
                batch = range(start, min(start + self._size, n))
                found.append((task, [batch[index] for index in own_share(self.fabric, len(batch))], n))
        return found


class Shown(NamedTuple):
    """What a model shows of a batch."""

    logits: torch.Tensor  # (B, K) or (B, N, K)
    counted: torch.Tensor  # which of them are compared, (B,) or (B, N)
    hidden: list[torch.Tensor]  # of each block, (B, N, D)
    tokens: torch.Tensor | None  # which tokens are no padding, (B, N); None: all


class Matching(Whole):
    """How far the merged model is from each expert on that expert's own task, in hidden states and answers.

    A task's loss is the mean over its examples of hidden * mean square distance of the hidden states, over blocks,
    tokens and their numbers, + T^2 KL(expert's answer, own answer), over tokens where there are several.
    """

    def __init__(
        self,
        fabric: Fabric,
        tasks: Mapping[str, Examples | Texts],
        batch_size: int,
        shells: Shells,
        stack: Stack,
        params: Any,
    ) -> None:
        """Nothing is run yet.

        Args:
            fabric: Devices.
            tasks: Each expert's own, in the order of the experts.
            batch_size: Rows of a task at a time.
            shells: The modules.
            stack: Base and task vectors, of which the experts are made again.
            params: With `temperature`, `hidden`, and `weights` of the tasks or None.

        Raises:
            UserError: Hidden states are wanted, and the model has no blocks.
        """
        super().__init__(fabric, tasks, batch_size, 0, "experts")
        self._shells, self._stack, self._params = shells, stack, params
        self._weights = dict(zip(tasks, per_expert("weights", params.weights or 1.0, len(tasks)), strict=True))
        self._blocks = blocks(next(iter(shells.modules.values()))) if params.hidden else []
        if params.hidden and not self._blocks:
            raise UserError("this model has no numbered blocks whose hidden states could be seen; use method.hidden=0")
        self._kept: dict[tuple[str, int], Shown] = {}
        self._room = KEPT_BYTES

    def _joined(self, forward: Forward, chosen: list[Chosen]) -> torch.Tensor:
        task, own, rows = chosen[0] if chosen else ("", [], 1)
        own = [place for place in own if self._tells(task, place)]
        if not own:
            return torch.zeros((), device=self.fabric.device)
        return (
            self._weights[task] * self._distances(self._shown(forward, task, own), self._expert(task, own)).sum() / rows
        )

    def _tells(self, task: str, place: int) -> bool:
        """Whether there is anything to see in a row: an empty text has no token."""
        examples = self.tasks[task]
        return isinstance(examples, Examples) or bool(examples.chosen([place])[0])

    def _expert(self, task: str, own: list[int]) -> Shown:
        """What the task's expert shows of the same rows."""
        key = (task, own[0])
        if key in self._kept:
            return self._kept[key]
        index = list(self.tasks).index(task)
        with torch.no_grad():
            weights = {name: self._stack.expert(name, index) for name in self._stack.base}
            shown = self._shown(self._shells.forward(weights), task, own)
        nbytes = sum(tensor.nbytes for tensor in (shown.logits, *shown.hidden))
        if nbytes <= self._room:
            self._room -= nbytes
            self._kept[key] = shown
        return shown

    def _shown(self, forward: Forward, task: str, own: list[int]) -> Shown:
        """Run a batch, and watch the blocks."""
        with watched(self._shells.modules[task], self._blocks) as seen:
            logits, counted, tokens = self._answers(forward, task, own)
        silent = [path for path in self._blocks if path not in seen]
        if silent:
            raise UserError(f"no hidden states come out of {', '.join(silent[:3])}; use method.hidden=0")
        return Shown(logits, counted, [seen[path] for path in self._blocks], tokens)

    def _answers(
        self, forward: Forward, task: str, own: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Logits, which of them are compared, and which tokens are no padding."""
        examples = self.tasks[task]
        if isinstance(examples, Examples):
            logits = forward(task, self._on(examples.batch(own)[0])) @ self._heads[task].T
            return logits, torch.ones(len(logits), device=logits.device), None
        rows = examples.chosen(own)
        classes = examples.kind == "text_classification"
        inputs = self._on(examples.pool.feed([row[0] for row in rows] if classes else rows))
        tokens = inputs.get("attention_mask")
        if classes:
            logits = forward(task, inputs).logits
            return logits, torch.ones(len(logits), device=logits.device), tokens
        labels = inputs["labels"]
        if examples.pool.family == "seq2seq":
            return forward(task, inputs).logits, labels != IGNORED, tokens
        del inputs["labels"]
        return forward(task, inputs).logits[:, :-1], labels[:, 1:] != IGNORED, tokens

    def _distances(self, own: Shown, expert: Shown) -> torch.Tensor:
        """Of each example, (B,)."""
        temperature = self._params.temperature
        logs, wanted = (log_softmax(shown.logits / temperature, -1) for shown in (own, expert))
        apart = kl_div(logs, wanted, reduction="none", log_target=True).sum(-1) * temperature**2
        found = _mean(apart, own.counted)
        if not own.hidden:
            return found
        squares = [
            _mean((mine - theirs).square().flatten(2).mean(2), _fitting(own.tokens, mine))
            for mine, theirs in zip(own.hidden, expert.hidden, strict=True)
        ]
        return found + self._params.hidden * torch.stack(squares).mean(0)


def blocks(module: nn.Module) -> list[str]:
    """The paths of a model's blocks, in order of depth: of a parameter's name all up to the first number."""
    found, n_blocks = depths([name for name, _ in module.named_parameters()], in_order=True)
    paths: dict[int, str] = {}
    for name, depth in found.items():
        segments = name.split(".")
        numbers = [index for index, segment in enumerate(segments) if segment.isdigit()]
        if numbers:
            paths[depth] = ".".join(segments[: numbers[0] + 1])
    return [paths[depth] for depth in range(1, n_blocks + 1)]


@contextmanager
def watched(module: nn.Module, paths: list[str]) -> Iterator[dict[str, torch.Tensor]]:
    """What comes out of some submodules, by their paths, as it comes out."""
    seen: dict[str, torch.Tensor] = {}

    def watch(path: str) -> Callable[..., None]:
        def note(layer: nn.Module, args: Any, output: Any) -> None:
            seen[path] = output[0] if isinstance(output, tuple) else output

        return note

    handles = [module.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _fitting(tokens: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    """Which tokens count, (B, N): a mask of other tokens than these (a decoder's, say) is none of theirs."""
    if tokens is not None and tokens.shape == hidden.shape[:2]:
        return tokens
    return torch.ones(hidden.shape[:2], device=hidden.device)


def _mean(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Of what counts of each example, (B, ...) -> (B,)."""
    values, counted = values.flatten(1) if values.dim() > 1 else values[:, None], counted.to(values)
    counted = counted.reshape(values.shape)
    return (values * counted).sum(1) / counted.sum(1).clamp(min=1)
