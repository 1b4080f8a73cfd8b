"""What a study optimises and what it asks for besides: metrics of a trial, their directions, bounds on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config import RunConfig, closest

METRICS = {  # of a kind of task
    "image_classification": "accuracy",
    "text_classification": "accuracy",
    "preference": "accuracy",
    "perplexity": "perplexity",
    "exact_match": "exact_match",
}
COSTS = ("time/merge_s", "time/evaluate_s", "model/bytes")
DIRECTIONS = ("maximize", "minimize")
BOUNDS = ("at_least", "at_most")
_RISING = ("accuracy", "exact_match", "normalized")  # the more the better


@dataclass(frozen=True)
class Objective:
    """A metric of a trial, and where it is to go."""

    metric: str
    direction: str

    @property
    def is_mean(self) -> bool:
        """Whether it is a mean over examples, so that pieces of the data tell of it."""
        head, _, what = self.metric.partition("/")
        return head not in ("worst", "time", "model") and what != "normalized"

    def better(self, one: float, other: float) -> bool:
        """Whether one value is better than another."""
        return one > other if self.direction == "maximize" else one < other


@dataclass(frozen=True)
class Bound:
    """What a metric must keep to."""

    metric: str
    kind: str
    value: float

    @property
    def name(self) -> str:
        """Its name among the trial's constraints."""
        return f"{self.metric} {self.kind}"

    def excess(self, metrics: Mapping[str, float]) -> float:
        """By how much it is broken; zero or less where it is met."""
        found = metrics[self.metric]
        return self.value - found if self.kind == "at_least" else found - self.value


def metrics_of(config: RunConfig) -> list[str]:
    """Every metric that trials of a configuration have."""
    tasks = {name: METRICS[task.kind] for name, task in config.tasks.tasks.items()}
    kinds = list(dict.fromkeys(tasks.values()))
    named = [f"{name}/{metric}" for name, own in tasks.items() for metric in (own, "loss")]
    means = [f"average/{metric}" for metric in [*kinds, "loss", "normalized"]]
    worst = [f"worst/{metric}" for metric in [*kinds, "normalized"]]
    return [*means, *worst, *named, *COSTS]


def objectives_of(given: Sequence[Any], config: RunConfig, faults: list[str]) -> tuple[Objective, ...]:
    """The objectives; by default the average over tasks of their metric."""
    known = metrics_of(config)
    found = []
    for entry in given or known[:1]:
        shape = {"metric": entry} if isinstance(entry, str) else entry
        if not isinstance(shape, dict) or not {"metric"} <= set(shape) <= {"metric", "direction"}:
            faults.append(f"study.objectives: {entry} is neither a metric nor {{metric: ..., direction: ...}}")
            continue
        metric, direction = str(shape["metric"]), shape.get("direction")
        if metric not in known:
            faults.append(f"study.objectives: {metric} is no metric of these tasks; {closest(metric, known)}")
        elif direction not in (None, *DIRECTIONS):
            faults.append(f"study.objectives: direction {direction} of {metric} is none of {', '.join(DIRECTIONS)}")
        else:
            rising = metric.rpartition("/")[2] in _RISING
            found.append(Objective(metric, direction or DIRECTIONS[0 if rising else 1]))
    if len({objective.metric for objective in found}) < len(found):
        faults.append("study.objectives: a metric is named twice")
    return tuple(found)


def bounds_of(given: Mapping[str, Mapping[str, Any]], config: RunConfig, faults: list[str]) -> tuple[Bound, ...]:
    """The bounds."""
    known = metrics_of(config)
    found = []
    for metric, bounds in given.items():
        if metric not in known:
            faults.append(f"study.constraints: {metric} is no metric of these tasks; {closest(metric, known)}")
            continue
        for kind, value in bounds.items():
            if kind not in BOUNDS:
                faults.append(f"study.constraints: {metric} is held by at_least or at_most, not by {kind}")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                faults.append(f"study.constraints: {metric} {kind} {value} is no number")
            else:
                found.append(Bound(metric, kind, float(value)))
    return tuple(found)
