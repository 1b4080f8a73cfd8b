"""What a compression learns from inputs: numbers that bring a restored expert's answers nearer to the expert's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from harness.compress import Expert, Packed
from harness.evaluate import IGNORED
from harness.examples import Examples, Inputs, Texts
from harness.learn import Course, learn, sum_gradients
from harness.losses import Losses, parameters_of

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from pools.open import Pool


def distilled(
    fabric: Fabric, packed: Packed, pool: Pool, fed: Mapping[str, Examples | Texts], batch_size: int, course: Course
) -> Packed:
    """The same compressed experts, with the part that the row names learnt, one expert after the other.

    Args:
        fabric: Devices.
        packed: What was packed.
        pool: The experts as they are.
        fed: Inputs of each expert's own task; labels are not looked at.
        batch_size: Inputs of a step, over all devices.
        course: Of each expert; its checkpoints are kept apart, and steps are reported as those of one course.

    Raises:
        FloatingPointError: The loss is no number; the message names the step.
        UserError: As `harness.learn.learn`.
    """
    tensors = {name: packed.tensors[name] for name in packed.tensors}
    for index, name in enumerate(packed.experts):
        losses = Losses(fabric, {name: fed[name]}, batch_size, packed.seed, "own")
        subject = Distilling(losses, packed, pool, name)
        learn(fabric, subject, losses, _own(course, name, index))
        for key, value in subject.learnt.items():
            tensors[key] = tensors[key].clone()
            tensors[key][index] = value.detach().to(tensors[key])
    return replace(packed, tensors=tensors)


def _own(course: Course, expert: str, index: int) -> Course:
    """The course of one expert."""
    saved = course.saved
    if saved is not None:
        saved = replace(saved, directory=saved.directory / expert, facts={**saved.facts, "expert": expert})
    return replace(
        course,
        name=f"{course.name} {expert}",
        report=lambda step, loss, shown: course.report(index * course.steps + step, loss, shown),
        saved=saved,
    )


class Distilling:
    """A part of one packed expert, a subject of `harness.learn`: the mean square of what its logits lack is minimised.

    Attributes:
        learnt: "<tensor>/<part>" -> the part.
    """

    coefficients = None

    def __init__(self, losses: Losses, packed: Packed, pool: Pool, name: str) -> None:
        """Make the expert's module twice: as it is, and to be filled with what is restored."""
        assert pool.base is not None, "a compression needs a base"
        self._device, self._fabric = losses.fabric.device, losses.fabric
        self._part, self._examples = packed.row.learns, losses.tasks[name]
        self._expert = Expert(packed, pool.base, pool.roles, name)
        index, ending = packed.experts.index(name), f"/{self._part}"
        self.learnt = {
            key: packed.tensors[key][index].to(self._device, copy=True).requires_grad_()
            for key in packed.tensors
            if key.endswith(ending)
        }
        self._names = {key: key.removesuffix(ending) for key in self.learnt}
        self._teacher = self._worn(pool.module(pool.experts[name]))
        self._student = self._worn(pool.module(self._expert))
        self._paths = parameters_of(pool, self._student, list(self._names.values()))

    def slope(self, step: int, losses: Losses) -> float:
        """As `harness.learn.Subject` says."""
        value = losses.backward(self._lacking)
        sum_gradients(self._fabric, self.learnt)
        return value

    def settle(self) -> None:
        """Nothing is bounded."""

    def _lacking(self, task: str, inputs: Inputs) -> torch.Tensor:
        """The mean square of the differences of the logits of each example, (B,)."""
        with torch.no_grad():
            wanted = self._logits(self._teacher(**inputs))
        weights = {
            self._paths[name]: self._expert.with_part(name, self._part, self.learnt[key]).to(self._device)
            for key, name in self._names.items()
        }
        found = self._logits(functional_call(self._student, weights, args=(), kwargs=inputs))
        squares = (found - wanted).square().mean(-1)  # (B,), of tokens (B, L)
        if squares.dim() == 1:
            return squares
        counted = inputs["labels"].ne(IGNORED) if "labels" in inputs else inputs["attention_mask"].bool()
        return (squares * counted).sum(1) / counted.sum(1).clamp(min=1)

    def _logits(self, output: Any) -> torch.Tensor:
        """Of images by the task's head, (B, K); of texts (B, K), or (B, L, V) where tokens are predicted."""
        return (
            output @ self._examples.head.to(self._device).T if isinstance(self._examples, Examples) else output.logits
        )

    def _worn(self, module: Any) -> Any:
        """The module on its device, a classifier with the head of its task."""
        own = self._examples
        if isinstance(own, Texts) and own.expert in getattr(own.heads or own.pool, "heads", {}):
            module = (own.heads or own.pool).with_head(module, own.expert)
        return module.to(self._device).requires_grad_(False)
