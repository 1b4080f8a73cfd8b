"""Builds: modules made of a pool's modules, and taught, each task with its own head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from harness.examples import Inputs, Texts
from harness.inputs import MergeError
from harness.learn import sum_gradients
from harness.losses import Losses, parameters_of
from harness.rebuild import parts_of
from methods.kinds import Row
from methods.lessons import Lesson


def rehearse(row: Row, params: Any, pool: Any, names: list[str]) -> None:
    """Build from modules without weights, so that what does not fit is known before any weight is read.

    Args:
        row: The method's.
        params: Its parameters.
        pool: Base and experts.
        names: The tensors that are merged, by the pool's names.

    Raises:
        MergeError: The architecture lacks what the method asks for, the parameters do not fit the experts, or the pool
            has no modules.
    """
    if not hasattr(pool, "feed"):
        raise MergeError(
            f"{row.name} builds a module out of modules, and a pool of family {pool.family} knows tensors only; choose "
            "a method that merges weights (`crucible list methods`)"
        )
    _made(row, params, pool, names, pool.skeleton(), (pool.skeleton() for _ in pool.experts))


def build(row: Row, params: Any, pool: Any, names: list[str]) -> nn.Module:
    """Have a method make its module; arguments and errors as `rehearse`'s."""
    first = next(iter(pool.experts.values()))
    base = pool.module() if pool.base is not None else pool.module(first)
    return _made(row, params, pool, names, base, (pool.module(tensors) for tensors in pool.experts.values()))


def _made(
    row: Row, params: Any, pool: Any, names: list[str], base: nn.Module, experts: Iterable[nn.Module]
) -> nn.Module:
    parts = parts_of(pool, base, parameters_of(pool, base, names).values(), list(pool.experts))
    try:
        made = row.load()(base, list(experts), params, parts)
    except ValueError as error:
        raise MergeError(str(error)) from error
    made.merged_names = sorted(parts.merged)
    return made


class Built:
    """What a build has left trainable, a subject of `harness.learn`; a lesson of its own says what is minimised."""

    coefficients = None

    def __init__(self, module: nn.Module, losses: Losses, pool: Any, seed: int) -> None:
        """Take the build, and what it is taught with."""
        self._fabric, self._module, self._seed = losses.fabric, module, seed
        self._tasks, self._order = losses.tasks, list(pool.experts)
        self._lesson: Lesson | None = getattr(module, "lesson", None)
        self.learnt = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}

    def slope(self, step: int, losses: Losses) -> float:
        """As `harness.learn.Subject` says."""
        if self._lesson is None:
            value = losses.backward(self._answer)
            sum_gradients(self._fabric, self.learnt)
            return value
        self._lesson.begin(self._module, torch.Generator().manual_seed((self._seed << 32) + step))
        each, gradients = [], []
        for part in losses.parts(apart=True):
            loss = part(self._learn if losses.kind == "own" else self._answer)
            gradients.append(self._gradient(loss))
            each.append(loss.detach())
        values = torch.tensor([losses.total(loss) for loss in each], device=self._fabric.device)
        if not bool(torch.isfinite(values).all()):  # no weights follow from such
            return float(values.sum())
        stacked = torch.stack(gradients)  # (T, n)
        combined = self._lesson.weigh(values, stacked) @ stacked
        sizes = [tensor.numel() for tensor in self.learnt.values()]
        for tensor, gradient in zip(self.learnt.values(), combined.split(sizes), strict=True):
            tensor.grad = gradient.view_as(tensor)
        return float(values.sum())

    def settle(self) -> None:
        """Nothing is bounded."""

    def finish(self) -> None:
        """After the last step."""
        if self._lesson is not None:
            self._lesson.finish(self._module)

    def _gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Of all that is learnt, flat, over all devices."""
        for tensor in self.learnt.values():
            tensor.grad = None
        if loss.requires_grad:
            loss.backward()
        for tensor in self.learnt.values():
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        sum_gradients(self._fabric, self.learnt)
        return torch.cat([tensor.grad.flatten() for tensor in self.learnt.values()])  # type: ignore[union-attr]

    def _answer(self, task: str, inputs: Inputs) -> Any:
        """What the module makes of a task's inputs, with the head of the task."""
        return self._worn(task)(**inputs)

    def _learn(self, task: str, inputs: Inputs) -> torch.Tensor:
        """The lesson's loss of each example, (B,)."""
        assert self._lesson is not None
        return self._lesson.loss(self._worn(task), self._order.index(task), inputs)

    def _worn(self, task: str) -> Any:
        own = self._tasks[task]
        if isinstance(own, Texts) and own.kind == "text_classification":
            return (own.heads or own.pool).with_head(self._module, own.expert)
        return self._module
