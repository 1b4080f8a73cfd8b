"""Losses that look for what a backdoor would answer to: a perturbation of the inputs within bounds, before each update.

It is found anew each time, from none, on the batch at hand and for the weights as they are; so it depends on nothing
that a checkpoint would have to hold. Inputs are images: their pixel values as the module is fed them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.nn.functional import cross_entropy

from harness.config import UserError
from harness.examples import Examples, Inputs, Texts
from harness.execute import sum_over_devices
from harness.losses import Chosen, Forward, Losses, Part, Shells, entropy
from methods.adversary import merged
from methods.kinds import Stack
from methods.simplex import onto_simplex

Answers = Callable[[torch.Tensor], torch.Tensor]  # pixel values (B, ...) -> logits (B, K)

STRIDE = 2.5  # how many times the bound all ascents together come to, as in Madry et al. 2018, arXiv:1706.06083


class Attacked(Losses):
    """The tasks' losses, and `adv_weight` times what a universal trigger, one for each task, does to them."""

    def __init__(
        self,
        fabric: Fabric,
        tasks: Mapping[str, Examples | Texts],
        batch_size: int,
        seed: int,
        shells: Shells,
        stack: Stack,
        params: Any,
    ) -> None:
        """Nothing is fed yet.

        Args:
            fabric: Devices.
            tasks: What is learnt from, by task: images.
            batch_size: Rows of each task at a time, over all devices.
            seed: Of the rows' order.
            shells: The modules.
            stack: Base and task vectors.
            params: A defence's: `methods.adversary.Adversary`, and its `loss`.
        """
        super().__init__(fabric, tasks, batch_size, seed, params.loss)
        self._params = params
        self._look(shells, stack)

    def _look(self, shells: Shells, stack: Stack) -> None:
        """Keep what is wanted of the weights as they are before anything is learnt: nothing."""

    def _parts(self, apart: bool, only: Container[str] | None) -> Iterator[Part]:
        for one in self._next():
            if only is None or one[0] in only:
                yield functools.partial(self._both, one=one)

    def _both(self, forward: Forward, one: Chosen) -> torch.Tensor:
        """A task's loss on its inputs and on what becomes of them."""
        task, own, rows = one
        share = 1 / rows if own else 0.0  # where another process has all rows, sums over devices go on without
        fed, labels = self.tasks[task].batch(own or [0])  # type: ignore[union-attr]
        inputs, labels = self._on(fed), labels.to(self.fabric.device)
        key = pixels_of(inputs)

        def seen(run: Forward, pixels: torch.Tensor) -> torch.Tensor:
            return run(task, {**inputs, key: pixels}) @ self._heads[task].T

        logits = seen(forward, inputs[key])
        wanted = labels if self.kind == "labels" else logits.argmax(1)
        clean = self._of_classes(logits, labels).sum() * share
        return clean + self._params.adv_weight * self._hurt(seen, forward, inputs[key], wanted, share)

    def _hurt(
        self,
        seen: Callable[[Forward, torch.Tensor], torch.Tensor],
        forward: Forward,
        pixels: torch.Tensor,
        wanted: torch.Tensor,
        share: float,
    ) -> torch.Tensor:
        """What the loss is under the trigger."""
        params = self._params

        def slope(trigger: torch.Tensor) -> torch.Tensor:
            loss = cross_entropy(seen(forward, pixels + trigger), wanted, reduction="sum") * share
            return sum_over_devices(self.fabric, torch.autograd.grad(loss, [trigger])[0])

        trigger = universal(slope, torch.zeros_like(pixels[:1]), params.adv_steps, params.trigger_norm)
        after = seen(forward, pixels + trigger)
        if getattr(params, "penalty", "agreement") == "entropy":
            return entropy(after).sum() * share
        return cross_entropy(after, wanted, reduction="sum") * share


class Shared(Attacked):
    """The tasks' losses, and `adv_weight` times how likely the mistakes are that the unchanged merge makes.

    They are made on perturbed examples, each with a perturbation of its own by which the model as it was and the model
    as it is come to the same wrong answers.
    """

    def _look(self, shells: Shells, stack: Stack) -> None:
        self._before = shells.forward(merged(stack, self._params.scale))

    def _hurt(
        self,
        seen: Callable[[Forward, torch.Tensor], torch.Tensor],
        forward: Forward,
        pixels: torch.Tensor,
        wanted: torch.Tensor,
        share: float,
    ) -> torch.Tensor:
        params, before = self._params, functools.partial(seen, self._before)

        def slope(change: torch.Tensor) -> torch.Tensor:
            was, now = before(pixels + change), seen(forward, pixels + change)
            fooled = sum(cross_entropy(logits, wanted, reduction="sum") for logits in (was, now)) / 2
            return torch.autograd.grad(params.fooling * fooled - divergence(was, now).sum(), [change])[0]

        change = each(slope, torch.zeros_like(pixels), params.adv_steps, params.trigger_norm)
        with torch.no_grad():
            mistaken = before(pixels + change).argmax(1)
        after = seen(forward, pixels + change)
        others = after.scatter(1, mistaken[:, None], -torch.inf).logsumexp(1)  # log(1 - p), and never log(0)
        return ((after.logsumexp(1) - others) * (mistaken != wanted)).sum() * share


ADVERSARIES: dict[str, type[Attacked]] = {"universal": Attacked, "shared": Shared}  # by a row's `adversary`

Slope = Callable[[torch.Tensor], torch.Tensor]  # a perturbation -> the gradient of what it is to raise


def universal(slope: Slope, start: torch.Tensor, steps: int, bound: float) -> torch.Tensor:
    """A perturbation of all examples alike, (1, ...), that moves a value by `bound` at most, on the mean."""
    most = bound * start.numel()

    def up(trigger: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        return within(trigger + found * (STRIDE * most / steps / found.abs().sum().clamp(min=1e-12)), most)

    return _ascended(slope, start, steps, up)


def each(slope: Slope, start: torch.Tensor, steps: int, bound: float) -> torch.Tensor:
    """A perturbation of every example, (B, ...), that moves no value by more than `bound`."""

    def up(change: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        return (change + found.sign() * (STRIDE * bound / steps)).clamp(-bound, bound)

    return _ascended(slope, start, steps, up)


def _ascended(
    slope: Slope, start: torch.Tensor, steps: int, up: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Go up so many times; the gradient of nothing else is touched."""
    perturbation = start
    for _ in range(steps):
        with torch.enable_grad():
            found = slope(perturbation.detach().requires_grad_())
        with torch.no_grad():
            perturbation = up(perturbation.detach(), found)
    return perturbation


def within(trigger: torch.Tensor, most: float) -> torch.Tensor:
    """The nearest perturbation whose values' sizes sum to `most` at most (Duchi et al. 2008).

    >>> within(torch.tensor([[3.0, -1.0]]), 2.0)
    tensor([[2., -0.]])
    """
    return trigger.sign() * most * onto_simplex(trigger.abs().flatten() / most, capped=True).view_as(trigger)


def divergence(ones: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Jensen and Shannon's, of the softmax of logits (B, K) and (B, K) -> (B,), in nats."""
    one, other = ones.softmax(-1), others.softmax(-1)
    middle = (one + other) / 2
    return (torch.special.entr(middle) - (torch.special.entr(one) + torch.special.entr(other)) / 2).sum(-1)


def pixels_of(inputs: Inputs) -> str:
    """The name of the only inputs that are no token ids.

    Raises:
        UserError: There are none, or several.
    """
    found = [name for name, tensor in inputs.items() if tensor.is_floating_point()]
    if len(found) != 1:
        raise UserError(
            f"a trigger is looked for in the pixel values of images, and this model is fed {', '.join(inputs)}; choose "
            "another method"
        )
    return found[0]
