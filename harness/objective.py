"""The loss that a method asks for when it finds a rule's coefficients in its own way, and what it was told before.

A method that asks does not depend on anything but the answers. So a checkpoint is the answers, in files that are each
written once; a run that was killed is told them again, and goes on to the same end without being asked for its state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric

from harness import checkpoint
from harness.checkpoint import ANSWERS, Saved
from harness.config import UserError
from harness.examples import Examples, Texts
from harness.learn import Merging
from harness.losses import Losses, Part, Shells
from harness.matching import Matching, Whole
from harness.triggers import ADVERSARIES
from methods.adamerging import AdamergingParams, Coefficients
from methods.kinds import Row, Stack


class Asked(NamedTuple):
    """A question and its answer."""

    coefficients: torch.Tensor  # (groups, T)
    loss: float
    slope: torch.Tensor  # (groups, T)


class Objective:
    """Coefficients (groups, T) of the task vectors -> their loss and its gradient, (groups, T)."""

    def __init__(
        self,
        fabric: Fabric,
        stack: Stack,
        granularity: str,
        shells: Shells,
        losses: Losses,
        saved: Saved | None = None,
    ) -> None:
        """Take what is merged, what runs it, what is minimised, and where answers are saved.

        Raises:
            UserError: What is saved there is of another run, or is not to be gone on with.
        """
        self._inner = Coefficients(stack, AdamergingParams(granularity=granularity))
        self._merging, self._shells, self._losses = Merging(fabric, self._inner, shells), shells, losses
        self._log = _Log(fabric, saved)
        self.groups, self.group_of = self._inner.groups, self._inner.group_of

    @property
    def shape(self) -> tuple[int, int]:
        """Groups and experts."""
        groups, experts = self._inner.values.shape
        return groups, experts

    def __call__(
        self, coefficients: torch.Tensor, tasks: Sequence[int] | None = None, slope: bool = True
    ) -> tuple[float, torch.Tensor]:
        """The loss of the next batches.

        Args:
            coefficients: (groups, T).
            tasks: The experts whose tasks count; None: all.
            slope: Whether the gradient is wanted; without it there is no backward pass, and zeros are given back.
        """
        known = self._log.recall(coefficients)
        if known is not None:
            self._losses.skip(1)
            return known.loss, known.slope
        with torch.no_grad():
            self._inner.values.copy_(coefficients)
        some = self._losses if tasks is None else _Some(self._losses, tasks)
        found = torch.zeros(self.shape)
        if slope:
            loss = self._merging.slope(0, some)  # type: ignore[arg-type]
            if self._inner.values.grad is not None:
                found = self._inner.values.grad.cpu()
        else:
            loss = self._value(some)
        if math.isfinite(loss):  # else whoever asks will stop
            self._log.add(Asked(coefficients.clone(), loss, found))
        return loss, found

    @torch.no_grad()
    def _value(self, losses: Losses | _Some) -> float:
        """The loss alone."""
        forward = self._shells.forward({name: self._inner.weight(name) for name in self._shells.paths})
        total = torch.zeros((), device=self._inner.values.device)
        for part in losses.parts():
            total += part(forward)
        return losses.total(total)


class _Some:
    """The losses of some tasks; batches are drawn of all, so that their order does not depend on who is asked."""

    def __init__(self, losses: Losses, tasks: Sequence[int]) -> None:
        names = list(losses.tasks)
        self._losses, self._tasks = losses, {names[index] for index in tasks}
        self.total = losses.total

    def parts(self, apart: bool = False) -> Iterator[Part]:
        """As `Losses` says."""
        return self._losses.parts(apart, self._tasks)


def losses_of(
    row: Row,
    params: Any,
    fabric: Fabric,
    fed: Mapping[str, Examples | Texts],
    batch_size: int,
    seed: int,
    shells: Shells,
    stack: Stack,
) -> Losses:
    """What a row minimises.

    Raises:
        UserError: A list is of another length than there are experts.
    """
    kind = getattr(params, "loss", row.loss)
    if kind == "experts":
        try:
            return Matching(fabric, fed, batch_size, shells, stack, params)
        except ValueError as error:  # a list of another length than there are experts
            raise UserError(str(error)) from error
    if row.adversary and params.adv_weight:
        return ADVERSARIES[row.adversary](fabric, fed, batch_size, seed, shells, stack, params)
    return (Whole if row.whole else Losses)(fabric, fed, batch_size, seed, kind)


class _Log:
    """What was asked and answered, `every` in a file."""

    def __init__(self, fabric: Fabric, saved: Saved | None) -> None:
        self._fabric, self._saved = fabric, saved
        self._new: list[Asked] = []
        self._n_written = 0
        self._past = iter(self._read() if saved else [])
        fabric.barrier()  # nobody writes before all have read

    def recall(self, coefficients: torch.Tensor) -> Asked | None:
        """The answer that was given before to this question, the next in order."""
        known = next(self._past, None)
        if known is not None and not torch.equal(known.coefficients, coefficients):
            raise UserError(
                f"adaptation.checkpoint={self._saved.directory}: what is asked now is not what was asked then, so that "  # type: ignore[union-attr]
                "this run would not be the same; name another directory"
            )
        return known

    def add(self, asked: Asked) -> None:
        """Keep an answer."""
        if self._saved is None:
            return
        self._new.append(asked)
        if len(self._new) < self._saved.every:
            return
        if self._fabric.is_global_zero:
            self._saved.directory.mkdir(parents=True, exist_ok=True)
            place = self._saved.directory / ANSWERS.replace("*", f"{self._n_written:08d}")
            checkpoint.write(place, self._saved, {"asked": [tuple(asked) for asked in self._new]})
        self._n_written += len(self._new)
        self._new = []

    def _read(self) -> list[Asked]:
        """All answers that are saved, in order."""
        saved = self._saved
        assert saved is not None, "the caller has looked"
        found: list[Asked] = []
        for place in sorted(saved.directory.glob(ANSWERS)):
            found += [Asked(*each) for each in checkpoint.read(place, saved)["asked"]]
        self._n_written = len(found)
        return found
