"""All of a study that can be checked before anything begins."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace

from harness.config import ConfigError, RunConfig, UserError
from harness.nested import tracking_uri
from harness.trials import depth_of, devices_of, refuse_test
from studies.coefficients import Depth, needs_depth
from studies.objectives import Bound, Objective, bounds_of, objectives_of
from studies.samplers import size_of, unfit
from studies.settings import Composed, StudySettings
from studies.space import Space, space_of
from studies.storage import default_url


@dataclass(frozen=True)
class Plan:
    """A study that has been checked; nothing has begun."""

    composed: Composed
    space: Space
    objectives: tuple[Objective, ...]
    bounds: tuple[Bound, ...]
    storage_url: str
    trials: int

    @property
    def settings(self) -> StudySettings:
        """The study's settings."""
        return self.composed.settings

    @property
    def config(self) -> RunConfig:
        """What trials vary, of the first method."""
        return next(iter(self.space.configs.values()))


def plan(composed: Composed) -> Plan:
    """Check all that can be checked before anything is opened.

    Raises:
        UserError: All that is wrong.
    """
    settings = composed.settings
    final = next(iter(composed.configs.values())).evaluation.split
    if settings.split == final and not settings.search_on_test:
        raise UserError(
            f"study.split={settings.split} is evaluation.split too: the winner would be judged by the rows that it was "
            "chosen on; search on another split, or say study.search_on_test=true"
        )
    refuse_test(settings.split, settings.search_on_test)
    configs = {
        method: replace(config, evaluation=replace(config.evaluation, split=settings.split))
        for method, config in composed.configs.items()
    }
    first = next(iter(configs.values()))
    faults = [
        f"study.split={settings.split}: task {name} has no such split; it has {', '.join(task.splits)}"
        for name, task in first.tasks.tasks.items()
        if settings.split not in task.splits
    ]
    if not first.tasks.tasks:
        raise ConfigError(["study: there are no tasks to score trials on; choose some with tasks=NAME"])
    objectives = objectives_of(settings.objectives, first, faults)
    bounds = bounds_of(settings.constraints, first, faults)
    depth = Depth(*depth_of(first)) if needs_depth(settings) else None
    space: Space | None = None
    try:
        space = space_of(settings, configs, depth)
    except ConfigError as error:
        faults += error.faults
    if space is not None:
        faults += unfit(settings, space, objectives)
        seeded = any(axis.key == "seed" for axis in space.axes)
        if seeded and settings.repeats > 1:
            faults.append("study.repeats: seeds are searched (study.space.seed) or averaged over, not both")
    if faults or space is None:
        raise ConfigError(faults)
    size = size_of(settings, space)
    trials = settings.trials if size is None else min(settings.trials, size)
    return Plan(composed, space, objectives, bounds, settings.storage or default_url(tracking_uri()), trials)


def warn(planned: Plan) -> None:
    """What is allowed and probably not meant."""
    settings = planned.settings
    devices = devices_of(planned.config)
    n = devices if devices is not None else os.cpu_count() or 1
    if settings.workers > n:
        kind = "GPUs" if devices is not None else "cores"
        print(
            f"crucible: study.workers={settings.workers}, and there are {n} {kind}: workers will share them",
            file=sys.stderr,
        )
    if planned.trials < settings.trials:
        print(f"crucible: the grid has {planned.trials} points, and so many trials are done", file=sys.stderr)
