"""The one training loop: anything with tensors to learn, a loss over batches of every task, Adam, checkpoints.

What is learnt and how the weights come of it is a subject's matter: a search's coefficients and masks (`Merging`), what
a build has left trainable (`Module`), or any other that answers the same questions. Every sum over examples is reduced
over the devices before a step. A checkpoint holds all that the next step depends on, so that a run that was killed goes
on to the same end, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from lightning.fabric import Fabric
from torch import nn
from tqdm import tqdm

from harness import checkpoint
from harness.checkpoint import FILE, Saved
from harness.execute import sum_over_devices
from harness.losses import Losses, Shells
from methods.kinds import Search
from methods.min_norm import min_norm

Report = Callable[[int, float, torch.Tensor | None], None]  # step, its loss, the coefficients (groups, T) that had it

BUCKET = 1 << 24  # numbers of gradients that are summed over the devices at once


class Subject(Protocol):
    """What is learnt."""

    @property
    def learnt(self) -> Mapping[str, torch.Tensor]:
        """What is learnt, by name; the tensors are changed in place."""
        ...

    def slope(self, step: int, losses: Losses) -> float:
        """The loss of the next batches, over all devices; its gradient is left in every tensor's `.grad`."""
        ...

    def settle(self) -> None:
        """Bring what a step has moved back to where it may be."""
        ...

    @property
    def coefficients(self) -> torch.Tensor | None:
        """What is shown of it on the way, (groups, T)."""
        ...


@dataclass(frozen=True)
class Course:
    """How something is learnt."""

    name: str  # of the method
    steps: int
    lr: float | Mapping[str, float]  # of all, or by what a learnt tensor's name begins with
    report: Report = lambda step, loss, coefficients: None
    saved: Saved | None = None


def learn(fabric: Fabric, subject: Subject, losses: Losses, course: Course) -> None:
    """Learn by Adam.

    Raises:
        FloatingPointError: The loss is no number; the message names the step and the coefficients.
        UserError: The checkpoint is of something else, or there is one and it is not to be gone on with.
    """
    named = dict(subject.learnt)
    optimizer = torch.optim.Adam([{"params": [tensor], "lr": _lr(course.lr, name)} for name, tensor in named.items()])
    past = _resumed(fabric, course, named, optimizer)
    losses.skip(past.drawn)
    with tqdm(total=course.steps, desc=course.name, unit="step", disable=True if fabric.global_rank else None) as bar:
        for step, (loss, coefficients) in enumerate(past.history):
            bar.update()
            course.report(step, loss, coefficients)
        for step in range(len(past.history), course.steps):
            optimizer.zero_grad()
            loss = subject.slope(step, losses)
            shown = None if subject.coefficients is None else subject.coefficients.detach().cpu().clone()
            if not math.isfinite(loss):
                raise FloatingPointError(_told(step, shown, course))
            course.report(step, loss, shown)
            optimizer.step()
            subject.settle()
            past.history.append((loss, None if shown is None else shown.mean(0, keepdim=True)))
            if course.saved and ((step + 1) % course.saved.every == 0 or step + 1 == course.steps):
                _refuse_non_finite(step, subject, course)
                _save(fabric, course.saved, named, optimizer, past.history, losses.drawn)
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    _refuse_non_finite(course.steps - 1, subject, course)


def sum_gradients(fabric: Fabric, tensors: Mapping[str, torch.Tensor]) -> None:
    """Sum `.grad` over the devices; what no device has a gradient of keeps none, so that Adam leaves it alone."""
    if fabric.world_size == 1:
        return
    having = torch.tensor([float(tensor.grad is not None) for tensor in tensors.values()], device=fabric.device)
    counts = sum_over_devices(fabric, having).tolist()
    wanted = [tensor for tensor, count in zip(tensors.values(), counts, strict=True) if count]
    for bucket in _buckets(wanted):
        own = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in bucket]
        total = sum_over_devices(fabric, torch.cat([gradient.flatten() for gradient in own]))
        for tensor, part in zip(bucket, total.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.grad = part.view_as(tensor)


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors that are summed at once: a sum of many small ones costs a message each."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and (sum(map(torch.numel, bucket)) + tensor.numel() > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


class Module:
    """What a build has left trainable."""

    coefficients = None

    def __init__(self, fabric: Fabric, module: nn.Module) -> None:
        self._fabric, self._module = fabric, module
        self.learnt = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}

    def slope(self, step: int, losses: Losses) -> float:
        """As `Subject` says."""
        value = losses(lambda inputs: self._module(**inputs))
        sum_gradients(self._fabric, self.learnt)
        return value

    def settle(self) -> None:
        """Nothing is bounded."""


class Merging:
    """What a search learns, the merged weights built once a pass from stacked task vectors, no expert as a module."""

    def __init__(self, fabric: Fabric, search: Search, shells: Shells, conflicts: str = "sum") -> None:
        """Take a search.

        Args:
            fabric: Devices.
            search: What is learnt, and how weights come of it.
            shells: The modules that run with these weights.
            conflicts: What becomes of the tasks' gradients: their `sum`, or by `mgda` the convex combination of the
                least norm, which lowers the loss of every task.
        """
        self._fabric, self._search, self._shells, self._apart = fabric, search, shells, conflicts == "mgda"
        self.learnt = search.learnt

    @property
    def coefficients(self) -> torch.Tensor | None:
        """Of the search, (groups, T)."""
        return self._search.coefficients

    @torch.no_grad()
    def slope(self, step: int, losses: Losses) -> float:
        """As `Subject` says."""
        self._search.begin(step, lambda: self._pass(losses))
        return self._pass(losses)

    @torch.no_grad()
    def settle(self) -> None:
        """As the search will have it."""
        self._search.settle()

    def _pass(self, losses: Losses) -> float:
        """One forward and backward pass of every task."""
        self._forget()
        weights = {name: self._search.weight(name).requires_grad_() for name in self._shells.paths}
        forward = self._shells.forward(weights)
        total = torch.zeros((), device=self._fabric.device)
        apart: list[dict[str, torch.Tensor]] = []
        for part in losses.parts(self._apart):
            with torch.enable_grad():
                value = part(forward)
                if value.requires_grad:
                    value.backward()
            total += value.detach()
            if self._apart:
                apart.append(self._pulled(weights))
                self._forget()
        found = self._combined(apart) if self._apart else self._pulled(weights)
        for name, gradient in found.items():
            self.learnt[name].grad = gradient
        return losses.total(total)

    def _pulled(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """From the weights' gradients to those of what is learnt, over all devices."""
        for name, weight in weights.items():
            slope, weight.grad = weight.grad, None
            if slope is not None:
                self._search.pull(name, slope)
        sum_gradients(self._fabric, self.learnt)
        return {name: tensor.grad for name, tensor in self.learnt.items() if tensor.grad is not None}

    def _combined(self, apart: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The combination of the tasks' gradients that has the least norm."""
        names = list(dict.fromkeys(name for own in apart for name in own))
        rows = [torch.cat([own[name].flatten().double() for name in names if name in own]) for own in apart if own]
        stacked = torch.stack(rows)
        shares = min_norm((stacked @ stacked.T).cpu())
        own = [found for found in apart if found]
        return {
            name: sum(share * found[name] for share, found in zip(shares, own, strict=True))  # type: ignore[misc]
            for name in names
        }

    def _forget(self) -> None:
        for tensor in self.learnt.values():
            tensor.grad = None


# -- checkpoints -------------------------------------------------------------------------------------------------------


@dataclass
class _Past:
    """What was done before."""

    history: list[tuple[float, torch.Tensor | None]] = field(default_factory=list)
    drawn: int = 0  # batches


def _save(
    fabric: Fabric,
    saved: Saved,
    learnt: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    history: list[tuple[float, torch.Tensor | None]],
    drawn: int,
) -> None:
    """Write a checkpoint in the place of the last; whoever is killed meanwhile leaves the last one."""
    if not fabric.is_global_zero:
        return
    content = {
        "learnt": {name: tensor.detach().cpu() for name, tensor in learnt.items()},
        "optimizer": optimizer.state_dict(),
        "history": history,
        "drawn": drawn,
    }
    saved.directory.mkdir(parents=True, exist_ok=True)
    checkpoint.write(saved.directory / FILE, saved, content)


def _resumed(
    fabric: Fabric, course: Course, learnt: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> _Past:
    """Take up what a checkpoint holds, if there is one."""
    saved = course.saved
    if saved is None or not (saved.directory / FILE).exists():
        return _Past()
    place = saved.directory / FILE
    content = checkpoint.read(place, saved)
    shapes = {name: tensor.shape for name, tensor in content["learnt"].items()}
    if shapes != {name: tensor.shape for name, tensor in learnt.items()}:
        raise checkpoint.other(place, "other tensors")
    with torch.no_grad():
        for name, tensor in learnt.items():
            tensor.copy_(content["learnt"][name])
    optimizer.load_state_dict(content["optimizer"])
    fabric.barrier()
    return _Past(content["history"], content["drawn"])


def _lr(lr: float | Mapping[str, float], name: str) -> float:
    """The learning rate of one tensor."""
    return lr if isinstance(lr, int | float) else next(rate for start, rate in lr.items() if name.startswith(start))


def _refuse_non_finite(step: int, subject: Subject, course: Course) -> None:
    """Neither save nor hand on what is no number."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in subject.learnt.values()):
        raise FloatingPointError(_told(step, subject.coefficients, course))


def _told(step: int, coefficients: torch.Tensor | None, course: Course) -> str:
    """What to say of a loss that is no number."""
    rates = course.lr if isinstance(course.lr, int | float) else ", ".join(map(str, course.lr.values()))
    means = [] if coefficients is None else [round(value, 4) for value in coefficients.mean(0).tolist()]
    shown = f", with the coefficients {means} (means over groups)" if means else ""
    return f"the loss is not a number at step {step}{shown}; a smaller lr than {rates} may help"
