"""The search space: axes from the ranges beside a method's parameters and from the study, checked before any trial.

An axis is one parameter of Optuna. Where several methods are searched, `method` is a category and every axis of a
method's own is conditional on it, named `ties.density`; with one method it is named by its key, `method.density`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from harness.config import ConfigError, RunConfig, closest
from harness.vary import value_of, vary
from methods.parameters import Range
from studies.coefficients import Coefficients, Depth, coefficients_of
from studies.settings import StudySettings

RANGE = {"low", "high", "log", "step", "choices"}
METHOD = "method"  # name of the category
# What a trial has no say in: where it runs, what it leaves behind, and the split that it is scored on.
CLOSED = ("fabric", "tracking", "output", "output_kind", "dry_run", "model", "adapter", "evaluation.split", "method")


@dataclass(frozen=True)
class Axis:
    """One parameter of Optuna."""

    name: str
    key: str  # of the configuration
    distribution: BaseDistribution
    method: str | None = None  # the method that it belongs to, where several are searched
    values: tuple[Any, ...] = ()  # what the labels of a category stand for
    default: Any = None  # as the configuration has it; None where it has nothing in the range

    def meant(self, found: Any) -> Any:
        """What a value of Optuna's stands for."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.values[self.distribution.choices.index(found)]
        return found

    def label(self, value: Any) -> Any:
        """Optuna's value for what it stands for; None where it is outside the axis."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.distribution.choices[self.values.index(value)] if value in self.values else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        own = self.distribution
        assert isinstance(own, FloatDistribution | IntDistribution)
        return value if own.low <= value <= own.high else None

    def ends(self) -> list[Any]:
        """Both ends and the middle, or every choice."""
        own = self.distribution
        if isinstance(own, CategoricalDistribution):
            return list(self.values)
        assert isinstance(own, FloatDistribution | IntDistribution)
        middle = math.sqrt(own.low * own.high) if own.log else (own.low + own.high) / 2
        if own.step is not None:
            middle = own.low + round((middle - own.low) / own.step) * own.step
        return list(dict.fromkeys([own.low, middle, own.high]))


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
            _suggest(trial, axis)
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
        told |= {axis.name: _told(axis) for axis in self.axes}
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
    asked = _flattened(settings.space)
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
        ranges = _defaults(config) if settings.default_space else {}
        covered = {layout.key} if layout is not None else set()
        wanted: dict[str, Any] = {key: {} for key in ranges if key not in covered} | own
        fixed[method] = {}
        for key, entry in wanted.items():
            if not _is_range(entry):
                fixed[method][key] = entry
                _closed(key, faults)
                continue
            name = key.replace("method.", f"{method}.", 1) if several and key.startswith("method.") else key
            axis = _axis(name, key, entry, config, method if name != key else None, faults)
            if axis is not None:
                axes[axis.name] = axis
        if layout is not None:
            prefix = f"{method}." if several else "method."
            axes |= {
                axis.name: axis for axis in _coefficient_axes(layout, settings, prefix, method if several else None)
            }
    faults += [_unknown(key, configs) for key in asked if key not in used]
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


# -- from the settings -------------------------------------------------------------------------------------------------


def _flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested and dotted keys as dotted ones; what is said of one key in both ways is joined.

    >>> _flattened({"method": {"scale": {"low": 0.1}}, "method.scale": {"high": 1}, "seed": 3})
    {'method.scale': {'low': 0.1, 'high': 1}, 'seed': 3}
    """
    found: dict[str, Any] = {}
    for name, entry in tree.items():
        key = f"{prefix}{name}"
        inner = {key: entry} if _is_range(entry) or not isinstance(entry, dict) else _flattened(entry, f"{key}.")
        for inside, value in inner.items():
            both = isinstance(value, dict) and isinstance(found.get(inside), dict)
            found[inside] = found[inside] | value if both else value
    return found


def _is_range(entry: Any) -> bool:
    return isinstance(entry, dict) and (not entry or bool(RANGE & set(entry)))


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


def _defaults(config: RunConfig) -> dict[str, Range]:
    """Key -> range, of the method's parameters that have one."""
    found = {f"method.{item.name}": item.metadata.get("range") for item in fields(config.method)}
    return {key: span for key, span in found.items() if span is not None}


def _axis(
    name: str, key: str, entry: Mapping[str, Any], config: RunConfig, method: str | None, faults: list[str]
) -> Axis | None:
    """An axis, from the range beside the parameter and what the study says over it."""
    before = len(faults)
    _closed(key, faults)
    strange = [word for word in entry if word not in RANGE]
    faults += [f"study.space.{key}.{word}: there is no such key; {closest(word, sorted(RANGE))}" for word in strange]
    try:
        current = value_of(config, key)
    except KeyError as error:
        faults.append(f"study.space.{error.args[0]}")
        return None
    span = _defaults(config).get(key, Range())
    choices = entry.get("choices", span.choices if not {"low", "high"} & set(entry) else ())
    if isinstance(current, bool) and not choices:
        choices = (False, True)
    if len(faults) > before:
        return None
    if choices:
        return _category(name, key, list(choices), current, method, faults)
    own = {word: entry.get(word, getattr(span, word)) for word in ("low", "high", "log", "step")}
    distribution = _numbers(key, own, current, faults)
    return None if distribution is None else Axis(name, key, distribution, method, default=current)


def _category(name: str, key: str, choices: Any, current: Any, method: str | None, faults: list[str]) -> Axis | None:
    if not isinstance(choices, list):
        faults.append(f"study.space.{key}.choices={choices}: expected a list")
        return None
    plain = all(choice is None or isinstance(choice, bool | int | float | str) for choice in choices)
    labels = choices if plain else [json.dumps(choice) for choice in choices]
    return Axis(name, key, CategoricalDistribution(labels), method, tuple(choices), current)


def _numbers(
    key: str, own: Mapping[str, Any], current: Any, faults: list[str]
) -> FloatDistribution | IntDistribution | None:
    """The distribution of a range of numbers."""
    low, high, log, step = own["low"], own["high"], own["log"], own["step"]
    where = f"study.space.{key}"
    if low is None or high is None:
        faults.append(f"{where}: it has no range by default; give low and high, or choices")
        return None
    if not all(type(end) in (int, float) and math.isfinite(end) for end in (low, high)):
        faults.append(f"{where}: low={low} and high={high} must be finite numbers")
    elif low > high:
        faults.append(f"{where}: low {low} is above high {high}; exchange them")
    elif log and low <= 0:
        faults.append(f"{where}: low {low} must be positive where log is true")
    elif log and step is not None:
        faults.append(f"{where}: log and step exclude each other; leave one out")
    elif step is not None and not (type(step) in (int, float) and step > 0):
        faults.append(f"{where}: step {step} must be positive")
    else:
        whole = type(current) is int or (current is None and all(type(end) is int for end in (low, high)))
        if whole and not all(float(end).is_integer() for end in (low, high, step or 1)):
            faults.append(f"{where}: whole numbers are wanted, got low={low}, high={high}, step={step}")
            return None
        if whole:
            return IntDistribution(
                int(low), _reached(int(low), int(high), int(step or 1)), log=bool(log), step=int(step or 1)
            )
        return FloatDistribution(
            float(low),
            _reached(float(low), float(high), step),
            log=bool(log),
            step=None if step is None else float(step),
        )
    return None


def _reached(low: Any, high: Any, step: Any) -> Any:
    """The last number that steps from `low` reach within `high`."""
    if step is None:
        return high
    return low + math.floor((high - low) / step + 1e-9) * step


def _coefficient_axes(layout: Coefficients, settings: StudySettings, prefix: str, method: str | None) -> Iterator[Axis]:
    low, high = (float(settings.coefficient_range[end]) for end in ("low", "high"))
    for name in layout.under(prefix).names:
        yield Axis(name, layout.key, FloatDistribution(low, high), method, default=layout.default)


def _closed(key: str, faults: list[str]) -> None:
    if key in CLOSED or key.partition(".")[0] in CLOSED[:-1]:
        hint = "; several methods are searched by study.methods=[...]" if key == "method" else ""
        faults.append(f"study.space.{key}: a study cannot search this{hint}")


def _unknown(key: str, configs: Mapping[str, RunConfig]) -> str:
    """What to say of a key that no method's configuration has."""
    known: list[str] = []
    for method, config in configs.items():
        names = [item.name for item in fields(config.method)]
        known += [f"method.{name}" for name in names] + [f"{method}.{name}" for name in names if len(configs) > 1]
    known += [name for name in vars(next(iter(configs.values()))) if name not in ("method", "schedules")]
    return f"study.space.{key}: there is no such key; {closest(key, list(dict.fromkeys(known)))}"


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


def _suggest(trial: Any, axis: Axis) -> None:
    own = axis.distribution
    if isinstance(own, CategoricalDistribution):
        trial.suggest_categorical(axis.name, own.choices)
    elif isinstance(own, IntDistribution):
        trial.suggest_int(axis.name, own.low, own.high, step=own.step, log=own.log)
    else:
        assert isinstance(own, FloatDistribution)
        trial.suggest_float(axis.name, own.low, own.high, step=own.step, log=own.log)


def _told(axis: Axis) -> str:
    own = axis.distribution
    if isinstance(own, CategoricalDistribution):
        return "one of " + ", ".join(map(str, own.choices))
    assert isinstance(own, FloatDistribution | IntDistribution)
    stepped = own.step is not None and (isinstance(own, FloatDistribution) or own.step != 1)
    return f"[{own.low}, {own.high}]" + (", logarithmic" if own.log else "") + (f", step {own.step}" if stepped else "")
