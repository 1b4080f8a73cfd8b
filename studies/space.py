"""The search space: axes from the ranges beside a method's parameters and from the study, checked before any trial.

Where several methods are searched, `method` is a category and every axis of a method's own is conditional on it, named
`ties.density`; with one method it is named by its key, `method.density`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from optuna.distributions import FloatDistribution

from harness.config import ConfigError, RunConfig
from harness.vary import vary
from studies.axis import Axis, in_words, suggest
from studies.coefficients import Coefficients, Depth, coefficients_of
from studies.ranges import axis_of, closed, defaults_of, flattened, is_range, unknown, unworn
from studies.settings import StudySettings

METHOD = "method"  # name of the category


@dataclass(frozen=True)
class Space:
    """What is searched, and the configurations that trials vary."""

    configs: Mapping[str, RunConfig]  # method -> configuration, on the search's split
    axes: tuple[Axis, ...]
    fixed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # method -> key -> value
    coefficients: Mapping[str, Coefficients] = field(
        default_factory=dict
    )  # method -> how its coefficients are laid out

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, of which the first stands for all where one is enough."""
        return tuple(self.configs)

    def of(self, method: str) -> list[Axis]:
        """The axes that a method has, its coefficients among them."""
        return [axis for axis in self.axes if axis.method in (None, method)]

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Have Optuna choose a value on every axis that counts."""
        method = self.methods[0]
        if len(self.methods) > 1:
            method = trial.suggest_categorical(METHOD, list(self.methods))
        for axis in self.of(method):
            suggest(trial, axis)
        return dict(trial.params)

    def config(self, params: Mapping[str, Any]) -> RunConfig:
        """The configuration that Optuna's values stand for.

        Raises:
            ConfigError: The method refuses them together.
        """
        method, values = self.values(params)
        return vary(self.configs[method], values)

    def values(self, params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The method, and every searched or fixed value by its key."""
        method = str(params.get(METHOD, self.methods[0]))
        found = {axis.name: axis.meant(params[axis.name]) for axis in self.of(method) if axis.name in params}
        own = self.coefficients.get(method)
        values = dict(self.fixed.get(method, {}))
        values |= {
            axis.key: found[axis.name] for axis in self.of(method) if axis.name in found and "/" not in axis.name
        }
        if own is not None and own.names and all(name in found for name in own.names):
            values[own.key] = own.value(found)
        return method, values

    def defaults(self) -> list[dict[str, Any]]:
        """Optuna's values for each method as its configuration has it; what lies outside the ranges is left out."""
        starts = []
        for method in self.methods:
            start = {METHOD: method} if len(self.methods) > 1 else {}
            for axis in self.of(method):
                label = axis.label(axis.default)
                if label is not None:
                    start[axis.name] = label
            starts.append(start)
        return starts

    def told(self) -> dict[str, str]:
        """Every axis and every fixed value in words."""
        told = {METHOD: "one of " + ", ".join(self.methods)} if len(self.methods) > 1 else {METHOD: self.methods[0]}
        told |= {axis.name: in_words(axis) for axis in self.axes}
        for method, values in self.fixed.items():
            prefix = f"{method}: " if len(self.methods) > 1 else ""
            told |= {f"{prefix}{key}": f"fixed at {json.dumps(value)}" for key, value in values.items()}
        return told


def space_of(settings: StudySettings, configs: Mapping[str, RunConfig], depth: Depth | None) -> Space:
    """The space of a study.

    Args:
        settings: The study's.
        configs: Method -> configuration that its trials vary.
        depth: What lies before, in and after the blocks of the pool's models; None where no axis asks for it.

    Raises:
        ConfigError: Keys that do not exist, ranges that are none, values that a method refuses; all of it.
    """
    faults: list[str] = []
    asked = flattened(settings.space)
    several = len(configs) > 1
    axes: dict[str, Axis] = {}
    fixed: dict[str, dict[str, Any]] = {}
    layouts: dict[str, Coefficients] = {}
    used: set[str] = set()
    for method, config in configs.items():
        own = _asked_of(asked, method, config, several, used)
        layout = coefficients_of(settings, config, depth, faults)
        if layout is not None:
            layouts[method] = layout
            for key, value in layout.fixed.items():
                own.setdefault(key, value)
        ranges = defaults_of(config) if settings.default_space else {}
        covered = {layout.key} if layout is not None else set()
        wanted: dict[str, Any] = {key: {} for key in ranges if key not in covered} | own
        fixed[method] = {}
        for key, entry in wanted.items():
            if "veneers" not in wanted:
                unworn(key, config, faults)
            if not is_range(entry):
                fixed[method][key] = entry
                closed(key, faults)
                continue
            name = key.replace("method.", f"{method}.", 1) if several and key.startswith("method.") else key
            axis = axis_of(name, key, entry, config, method if name != key else None, faults)
            if axis is not None:
                axes[axis.name] = axis
        if layout is not None:
            prefix = f"{method}." if several else "method."
            axes |= {
                axis.name: axis for axis in _coefficient_axes(layout, settings, prefix, method if several else None)
            }
    faults += [unknown(key, configs) for key in asked if key not in used]
    space = Space(dict(configs), tuple(axes.values()), fixed, _named(layouts, several))
    if not faults:
        faults += _refused(space)
    if not faults and not axes and not several:
        faults.append("study: nothing is searched; the method has no ranges, give some in study.space")
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return space


def _named(layouts: Mapping[str, Coefficients], several: bool) -> dict[str, Coefficients]:
    return {method: layout.under(f"{method}." if several else "method.") for method, layout in layouts.items()}


def _asked_of(
    asked: Mapping[str, Any], method: str, config: RunConfig, several: bool, used: set[str]
) -> dict[str, Any]:
    """What the study's own space says for a method, by the configuration's keys."""
    own: dict[str, Any] = {}
    names = {item.name for item in fields(config.method)}
    for key, entry in asked.items():
        head, _, rest = key.partition(".")
        if head == "method" and rest.partition(".")[0] not in names:
            continue
        if several and head == method:
            own[f"method.{rest}"] = entry
            used.add(key)
        elif head == "method" or not several or head in vars(config):
            own.setdefault(key, entry)
            used.add(key)
    return own


def _coefficient_axes(layout: Coefficients, settings: StudySettings, prefix: str, method: str | None) -> Iterator[Axis]:
    low, high = (float(settings.coefficient_range[end]) for end in ("low", "high"))
    for name in layout.under(prefix).names:
        yield Axis(name, layout.key, FloatDistribution(low, high), method, default=layout.default)


def _refused(space: Space) -> list[str]:
    """What the configuration refuses of both ends and the middle of every axis, the others being in their middle."""
    faults: list[str] = []
    low_high = {axis.name: axis.ends() for axis in space.axes}
    for method in space.methods:
        own = space.of(method)
        middle = {axis.name: axis.label(low_high[axis.name][len(low_high[axis.name]) // 2]) for axis in own}
        if len(space.methods) > 1:
            middle[METHOD] = method
        tried = [{**middle, axis.name: axis.label(end)} for axis in own for end in low_high[axis.name]] or [middle]
        for params in tried:
            try:
                space.config(params)
            except ConfigError as error:
                faults += [f"study.space: {fault}" for fault in error.faults]
    return list(dict.fromkeys(faults))
