"""What is tried first: the methods' defaults, settings that papers report, the user's own, another study's best."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import optuna
from optuna.storages import BaseStorage

from harness.config import ConfigError, UserError, closest
from studies.ranges import defaults_of
from studies.settings import StudySettings
from studies.space import METHOD, Space

BEST = 5  # of a front, that another study passes on at most


def starts_of(space: Space, settings: StudySettings, storage: BaseStorage) -> list[dict[str, Any]]:
    """What is tried first, by Optuna's names.

    Raises:
        UserError: A start names what is not searched, or there is no study to take from.
    """
    starts: list[dict[str, Any]] = [_own(start, space) for start in settings.starts]
    if settings.from_study is not None:
        starts += _best_of(settings.from_study, space, storage)
    if settings.warm_start:
        starts += [*space.defaults(), *_published(space)]
    if settings.sampler in ("grid", "bruteforce"):  # they walk through all points themselves
        return []
    return [start for start in starts if start]


def _own(start: dict[str, Any], space: Space) -> dict[str, Any]:
    """A start by Optuna's names, from the keys of the space."""
    axes = {axis.name: axis for axis in space.axes}
    known = [*axes, *([METHOD] if len(space.methods) > 1 else [])]
    faults = [f"study.starts: {name} is not searched; {closest(name, known)}" for name in start if name not in known]
    found = {name: start[name] if name == METHOD else axes[name].label(start[name]) for name in start if name in known}
    faults += [f"study.starts: {name}={start[name]} is outside its range" for name in found if found[name] is None]
    if faults:
        raise ConfigError(faults)
    return found


def _best_of(name: str, space: Space, storage: BaseStorage) -> list[dict[str, Any]]:
    """The best trials of another study, as far as this one searches the same."""
    names = optuna.get_all_study_names(storage)
    if name not in names:
        raise UserError(f"study.from={name}: there is no such study in this storage; {closest(name, names)}")
    other = optuna.load_study(study_name=name, storage=storage)
    axes = {axis.name: axis for axis in space.axes}
    found = []
    for trial in other.best_trials[:BEST]:
        start = {
            key: value
            for key, value in trial.params.items()
            if key in axes and axes[key].distribution._contains(axes[key].distribution.to_internal_repr(value))
        }
        if len(space.methods) > 1 and trial.params.get(METHOD) in space.methods:
            start[METHOD] = trial.params[METHOD]
        found.append(start)
    return found


def _published(space: Space) -> Iterator[dict[str, Any]]:
    """The defaults with one parameter as a paper reports it."""
    for method, start in zip(space.methods, space.defaults(), strict=True):
        spans = defaults_of(space.configs[method])
        for axis in space.of(method):
            span = spans.get(axis.key) if "/" not in axis.name else None
            for value in span.published if span is not None else ():
                label = axis.label(value)
                if label is not None:
                    yield {**start, axis.name: label}
