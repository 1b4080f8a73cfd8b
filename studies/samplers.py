"""Samplers and pruners of Optuna by name, with their own settings."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from harness.config import closest
from studies.objectives import Objective
from studies.settings import StudySettings
from studies.space import Axis, Space

SAMPLERS: dict[str, str] = {
    "tpe": "TPESampler",
    "cmaes": "CmaEsSampler",
    "gp": "GPSampler",
    "nsgaii": "NSGAIISampler",
    "nsgaiii": "NSGAIIISampler",
    "qmc": "QMCSampler",
    "random": "RandomSampler",
    "grid": "GridSampler",
    "bruteforce": "BruteForceSampler",
}
PRUNERS: dict[str, str] = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "hyperband": "HyperbandPruner",
    "successive_halving": "SuccessiveHalvingPruner",
    "threshold": "ThresholdPruner",
    "patient": "PatientPruner",
    "wilcoxon": "WilcoxonPruner",
}
_ONE = ("cmaes",)  # samplers of a single objective
_SHARED = ("qmc", "grid", "bruteforce")  # all workers draw from one sequence: they have one seed
_OWN = ("seed", "search_space", "constraints_func", "wrapped_pruner", "self")  # not the user's to set
POINTS = 5  # of a range without a step, on a grid


def sampler_of(settings: StudySettings, space: Space, seed: int, worker: int = 0, done: int = 0) -> BaseSampler:
    """The sampler of a worker.

    Args:
        settings: The study's.
        space: What is searched.
        seed: The study's seed.
        worker: Workers draw different numbers.
        done: Trials there are already: a resumed study does not draw the same numbers again.
    """
    name = settings.sampler
    own = dict(settings.sampler_settings)
    if name == "grid":
        own["search_space"] = grid_of(space, int(own.pop("points", POINTS)))
    elif name in ("cmaes", "gp", "qmc"):
        own.setdefault("warn_independent_sampling", False)
    if name == "qmc":
        own.setdefault("warn_asynchronous_seeding", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return getattr(optuna.samplers, SAMPLERS[name])(
            seed=seed if name in _SHARED else _mixed(seed, worker, done), **own
        )


def pruner_of(settings: StudySettings) -> BasePruner:
    """The pruner."""
    own = dict(settings.pruner_settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if settings.pruner == "patient":
            own.setdefault("patience", 2)
            return optuna.pruners.PatientPruner(optuna.pruners.MedianPruner(), **own)
        if settings.pruner == "percentile":
            own.setdefault("percentile", 25.0)
        if settings.pruner == "wilcoxon":
            own.setdefault("n_startup_steps", 14)  # up to 13 pairs with ties scipy permutes: 0.2 s, more than a step
        return getattr(optuna.pruners, PRUNERS[settings.pruner])(**own)


def unfit(settings: StudySettings, space: Space, objectives: Sequence[Objective]) -> list[str]:
    """What does not go together: names, settings, and what a sampler or pruner can do."""
    faults: list[str] = []
    _known("sampler", settings.sampler, settings.sampler_settings, SAMPLERS, optuna.samplers, faults)
    _known("pruner", settings.pruner, settings.pruner_settings, PRUNERS, optuna.pruners, faults)
    if settings.sampler in _ONE and len(objectives) > 1:
        faults.append(f"study.sampler={settings.sampler} takes one objective; nsgaii, nsgaiii, gp and tpe take several")
    if settings.pruner != "none" and len(objectives) > 1:
        faults.append(f"study.pruner={settings.pruner}: only a single objective can be pruned; study.pruner=none")
    if settings.pruner != "none" and any(objective.metric.startswith(("time/", "model/")) for objective in objectives):
        faults.append(f"study.pruner={settings.pruner}: a cost is known at the end only; study.pruner=none")
    if settings.pruner == "wilcoxon" and not all(objective.is_mean for objective in objectives):
        faults.append("study.pruner=wilcoxon compares means over pieces of the data: optimise average/... or TASK/...")
    if settings.sampler == "grid" and len(space.methods) > 1:
        faults.append("study.sampler=grid takes one method; bruteforce walks through conditional parameters too")
    if settings.sampler == "bruteforce":
        faults += [
            f"study.sampler=bruteforce: {axis.name} has no end of values; give it a step or choices"
            for axis in space.axes
            if isinstance(axis.distribution, FloatDistribution) and axis.distribution.step is None
        ]
    if not faults:
        faults += _refused(settings, space)
    return faults


def grid_of(space: Space, points: int) -> dict[str, list[Any]]:
    """The values of every axis on a grid: choices, steps, or so many points of a range."""
    return {axis.name: _points(axis, points) for axis in space.axes}


def size_of(settings: StudySettings, space: Space) -> int | None:
    """How many trials there are to be had of a grid; None for other samplers."""
    if settings.sampler != "grid":
        return None
    total = 1
    for values in grid_of(space, int(settings.sampler_settings.get("points", POINTS))).values():
        total *= len(values)
    return total


def _points(axis: Axis, points: int) -> list[Any]:
    own = axis.distribution
    if isinstance(own, CategoricalDistribution):
        return list(own.choices)
    assert isinstance(own, FloatDistribution | IntDistribution)
    if own.step is not None and not own.log:
        count = round((own.high - own.low) / own.step) + 1
        if isinstance(own, FloatDistribution) or count <= points:
            return [own.low + index * own.step for index in range(count)]
    shares = [index / max(points - 1, 1) for index in range(points)]
    if own.log:
        values: list[Any] = [own.low * (own.high / own.low) ** share for share in shares]
    else:
        values = [own.low + (own.high - own.low) * share for share in shares]
    whole = isinstance(own, IntDistribution)
    values = [own.low + round((value - own.low) / own.step) * own.step for value in values] if whole else values
    return list(dict.fromkeys(min(max(value, own.low), own.high) for value in values))


def _known(
    what: str, name: str, given: Mapping[str, Any], table: Mapping[str, str], module: Any, faults: list[str]
) -> None:
    """Note an unknown name, and settings that it does not have."""
    if name not in table:
        faults.append(f"study.{what}={name}: there is no such {what}; {closest(name, table)}")
        return
    own = [word for word in inspect.signature(getattr(module, table[name]).__init__).parameters if word not in _OWN]
    own += ["points"] if name == "grid" else []
    faults += [
        f"study.{what}_settings.{word}: {name} has no such setting; {closest(word, own)}"
        for word in given
        if word not in own
    ]


def _refused(settings: StudySettings, space: Space) -> list[str]:
    """What Optuna itself says of the settings' values, and libraries that are not there."""
    tried: list[tuple[str, Callable[[], Any]]] = [
        (f"study.sampler={settings.sampler}", lambda: sampler_of(settings, space, 0)),
        (f"study.pruner={settings.pruner}", lambda: pruner_of(settings)),
    ]
    faults = []
    for where, make in tried:
        try:
            make()
        except (ValueError, TypeError, ImportError) as error:
            faults.append(f"{where}: {error}")
    return faults


def _mixed(*numbers: int) -> int:
    """A seed of 32 bits from several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "little")
