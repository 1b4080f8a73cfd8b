"""From what a study says of a key, and the range beside the parameter, to an axis; all that is no range is told."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from harness.config import RunConfig, closest
from harness.vary import value_of
from methods.parameters import Range
from studies.axis import Axis

RANGE = {"low", "high", "log", "step", "choices"}
# What a trial has no say in: where it runs, what it leaves behind, and the split that it is scored on.
CLOSED = ("fabric", "tracking", "output", "output_kind", "dry_run", "model", "adapter", "evaluation.split", "method")


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested and dotted keys as dotted ones; what is said of one key in both ways is joined.

    >>> flattened({"method": {"scale": {"low": 0.1}}, "method.scale": {"high": 1}, "seed": 3})
    {'method.scale': {'low': 0.1, 'high': 1}, 'seed': 3}
    """
    found: dict[str, Any] = {}
    for name, entry in tree.items():
        key = f"{prefix}{name}"
        inner = {key: entry} if is_range(entry) or not isinstance(entry, dict) else flattened(entry, f"{key}.")
        for inside, value in inner.items():
            both = isinstance(value, dict) and isinstance(found.get(inside), dict)
            found[inside] = found[inside] | value if both else value
    return found


def is_range(entry: Any) -> bool:
    """Whether an entry of a space is a range or choices, and no fixed value."""
    return isinstance(entry, dict) and (not entry or bool(RANGE & set(entry)))


def defaults_of(config: RunConfig) -> dict[str, Range]:
    """Key -> range, of the parameters of the method and of the veneers around it that have one and do something."""
    own = {"method": config.method} | {f"veneer.{name}": vars(config.veneer)[name] for name in config.veneers}
    return {key: span for key, span in _ranges(own).items() if _does_something(own[key.rpartition(".")[0]], span)}


def _does_something(params: Any, span: Range) -> bool:
    return span.when is None or getattr(params, span.when[0]) == span.when[1]


def _every(config: RunConfig) -> dict[str, Range]:
    """The same with all veneers there are: one may be put around the method by the search."""
    veneers = vars(config.veneer) if config.veneer is not None else {}
    return _ranges({"method": config.method} | {f"veneer.{name}": own for name, own in veneers.items()})


def _ranges(sections: Mapping[str, Any]) -> dict[str, Range]:
    found = {
        f"{where}.{item.name}": item.metadata.get("range") for where, own in sections.items() for item in fields(own)
    }
    return {key: span for key, span in found.items() if span is not None}


def axis_of(
    name: str, key: str, entry: Mapping[str, Any], config: RunConfig, method: str | None, faults: list[str]
) -> Axis | None:
    """An axis, from the range beside the parameter and what the study says over it."""
    before = len(faults)
    closed(key, faults)
    strange = [word for word in entry if word not in RANGE]
    faults += [f"study.space.{key}.{word}: there is no such key; {closest(word, sorted(RANGE))}" for word in strange]
    try:
        current = value_of(config, key)
    except KeyError as error:
        faults.append(f"study.space.{error.args[0]}")
        return None
    span = _every(config).get(key, Range())
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


def closed(key: str, faults: list[str]) -> None:
    """Note a key that a trial has no say in."""
    if key in CLOSED or key.partition(".")[0] in CLOSED[:-1]:
        hint = "; several methods are searched by study.methods=[...]" if key == "method" else ""
        faults.append(f"study.space.{key}: a study cannot search this{hint}")


def unworn(key: str, config: RunConfig, faults: list[str]) -> None:
    """Note a parameter of a veneer that is not around the method, where it would change nothing."""
    head, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    if head == "veneer" and name not in config.veneers and hasattr(config.veneer, name):
        faults.append(f"study.space.{key}: {name} is not around the method; add it with veneers=[{name}]")


def unknown(key: str, configs: Mapping[str, RunConfig]) -> str:
    """What to say of a key that no method's configuration has."""
    known: list[str] = []
    for method, config in configs.items():
        names = [item.name for item in fields(config.method)]
        known += [f"method.{name}" for name in names] + [f"{method}.{name}" for name in names if len(configs) > 1]
    known += [name for name in vars(next(iter(configs.values()))) if name not in ("method", "schedules")]
    return f"study.space.{key}: there is no such key; {closest(key, list(dict.fromkeys(known)))}"
