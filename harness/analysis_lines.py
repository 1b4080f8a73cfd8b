"""Scores along lines and over planes between models: base + sum of coefficients times task vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from lightning.fabric import Fabric

from harness.analysis_settings import BASE, SUM
from harness.bench import Bench
from harness.evaluate import TaskScore, evaluate
from harness.inputs import Inputs

Coefficients = Mapping[str, float]  # expert -> what its change is multiplied by
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Between:
    """The models between a pool's; base and the experts that are asked for stay in memory, in float32."""

    bench: Bench
    fabric: Fabric
    experts: tuple[str, ...]
    split: str
    rows: int | None
    batch_size: int
    seed: int

    @cached_property
    def _base(self) -> dict[str, torch.Tensor]:
        base = self.bench.pool.base
        assert base is not None
        return {name: base[name] for name in base}

    @cached_property
    def _deltas(self) -> dict[str, dict[str, torch.Tensor]]:
        pool = self.bench.pool
        inputs = Inputs(pool.base, pool.experts, pool.roles)
        names = [name for name in self._base if inputs.is_weight(name)]
        return {
            expert: {name: pool.experts[expert][name].float() - self._base[name].float() for name in names}
            for expert in self.experts
        }

    def tasks_of(self, ends: Sequence[str]) -> list[str]:
        """The tasks of the experts' names; all where the sum is among them, or none is called so."""
        known = list(self.bench.tasks)
        own = [name for name in known if name in ends]
        return known if SUM in ends or not own else own

    def scores(self, coefficients: Coefficients, tasks: Sequence[str], tick: Tick) -> list[TaskScore]:
        """The score of one model on some tasks."""
        weights = dict(self._base)
        for expert, value in coefficients.items():
            if value:
                for name, delta in self._deltas[expert].items():
                    weights[name] = weights[name].float() + value * delta
        module = self.bench.pool.module(weights)
        examples = {task: self.bench.examples(task, self.split, self.rows, self.seed) for task in tasks}
        return list(evaluate(self.fabric, module, examples, self.batch_size, tick))


def ends_of(line: str) -> tuple[str, str]:
    """Both ends of A:B."""
    first, _, second = line.partition(":")
    return first, second


def place_of(end: str, experts: Sequence[str]) -> dict[str, float]:
    """Where an end stands: zeros for the base, ones for the sum, one for an expert."""
    if end in (BASE, SUM):
        return dict.fromkeys(experts if end == SUM else (), 1.0)
    return {end: 1.0}


def along(
    line: str, experts: Sequence[str], points: int, span: Sequence[float]
) -> Iterator[tuple[float, Coefficients]]:
    """Evenly spaced points of a line: t, and the coefficients there."""
    first, second = (place_of(end, experts) for end in ends_of(line))
    for t in spaced(points, span):
        names = dict.fromkeys([*first, *second])
        yield t, {name: (1 - t) * first.get(name, 0.0) + t * second.get(name, 0.0) for name in names}


def spaced(points: int, span: Sequence[float]) -> list[float]:
    """Evenly spaced numbers, the ends included.

    >>> spaced(3, [0.0, 1.0])
    [0.0, 0.5, 1.0]
    """
    low, high = span
    return [low + (high - low) * index / (points - 1) for index in range(points)]


def mean_loss(scores: Sequence[TaskScore]) -> float:
    """Over the tasks."""
    return math.fsum(score.loss for score in scores) / len(scores)


def mean_value(scores: Sequence[TaskScore]) -> float:
    """Over the tasks; NaN where their metrics differ."""
    same = len({score.metric for score in scores}) == 1
    return math.fsum(score.value for score in scores) / len(scores) if same else math.nan
