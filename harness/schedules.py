"""Parameters that differ from tensor to tensor: read from the configuration, checked, and resolved for every name.

A number of a rule's parameters may be written as a schedule:

    density: [1.0, 0.2]                              from the first block to the last, linearly in between
    scale: [{match: "*mlp*", value: 0.5}, {value: 1}]  the first entry that fits a tensor's name; none: the default
    weights: [1.0, [0.0, 1.0], [{at: blocks, value: 0.3}, {value: 1}]]  per expert: a number or a schedule each

Keys of an entry: `match` (shell glob on the tensor's name, or `re:` and a regular expression), `not` (the same,
excluding), `at` (before, blocks or after: where the tensor lies), `layers` ([first, last], half-open, of the blocks:
lists then run over this range), `value` (a number, or a list as above), `strict` (true: an entry whose conditions no
tensor meets is an error). What lies before the blocks takes a list's first value, what follows them its last.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from harness.config import UserError, closest
from methods.kinds import Kind, Row
from methods.kinds import resolve as load
from pools.patterns import PatternError, matcher

Schedules = dict[str, Any]  # field -> schedule; of a field per expert, a list of numbers and schedules
_KEYS = ("match", "not", "at", "layers", "value", "strict")
_PLACES = ("before", "blocks", "after")


# -- from the configuration --------------------------------------------------------------------------------------------


def split(values: Any, row: Row, faults: list[str]) -> tuple[Any, Schedules]:
    """The method's section of a configuration with a number in the place of each schedule, and the schedules.

    Args:
        values: The section as it was written.
        row: The method.
        faults: What is wrong with the form of schedules is added here, named with its key.
    """
    if not isinstance(values, dict) or row.kind not in (Kind.rule, Kind.informed):
        return values, {}
    found: Schedules = {}
    plain = dict(values)
    for name, value in values.items():
        if name in _scalars(row) and isinstance(value, list):
            wrong = _faults(value, f"method.{name}")
            plain[name] = _largest(value) if not wrong else _default(row, name)
        elif name in _lists(row) and isinstance(value, list) and any(isinstance(entry, list) for entry in value):
            lists = [(index, entry) for index, entry in enumerate(value) if isinstance(entry, list)]
            wrong = [fault for index, entry in lists for fault in _faults(entry, f"method.{name}[{index}]")]
            plain[name] = (
                [_largest(entry) if isinstance(entry, list) else entry for entry in value] if not wrong else None
            )
        else:
            continue
        faults += wrong
        if not wrong:
            found[name] = value
    return plain, found


def refused(params: Any, schedules: Schedules, row: Row) -> list[str]:
    """Values in schedules that the method itself refuses, and schedules where one value must do for all tensors."""
    faults = []
    fixed = load(row.prepared)(params) if row.prepared else ()
    for name, schedule in schedules.items():
        entries = schedule if name in _lists(row) else [schedule]
        if name in fixed and any(
            len(set(_reached(entry, row, name))) > 1 for entry in entries if isinstance(entry, list)
        ):
            hint = "; with method.scope=tensor it may" if hasattr(params, "scope") else ""
            faults.append(f"method.{name}: one value is needed for the whole model, it cannot differ by tensor{hint}")
        for value in () if name in _lists(row) else dict.fromkeys(_numbers(schedule)):
            try:
                dataclasses.replace(params, **{name: float(value)})
            except ValueError as error:
                faults += [f"method.{name}: {line}" for line in str(error).splitlines()]
    return list(dict.fromkeys(faults))


def _scalars(row: Row) -> list[str]:
    """Fields that take a schedule: numbers that studies search."""
    hints = typing.get_type_hints(row.load_params())
    fields = dataclasses.fields(row.load_params())
    return [field.name for field in fields if hints[field.name] is float and "range" in field.metadata]


def _lists(row: Row) -> list[str]:
    """Fields that take a number or a schedule for each expert."""
    hints = typing.get_type_hints(row.load_params())
    return [name for name, hint in hints.items() if list[float] in (hint, *typing.get_args(hint))]


def _default(row: Row, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(row.load_params()) if field.name == name)


def _faults(schedule: Any, where: str) -> list[str]:
    """What is wrong with the form of a schedule."""
    if _is_gradient(schedule):
        return []
    if not schedule or not all(isinstance(entry, dict) for entry in schedule):
        return [f"{where}={schedule}: expected numbers, first block to last, or entries {{match: ..., value: ...}}"]
    return [fault for index, entry in enumerate(schedule) for fault in _entry_faults(entry, f"{where}[{index}]")]


def _entry_faults(entry: Mapping[Any, Any], where: str) -> Iterator[str]:
    """What is wrong with one entry of a schedule."""
    for key in entry:
        if key not in _KEYS:
            yield f"{where}.{key}: there is no such key; {closest(str(key), _KEYS)}"
    value = entry.get("value")
    if not _is_number(value) and not _is_gradient(value):
        yield f"{where}.value={value}: expected a finite number, or a list of them from the first block to the last"
    if entry.get("at", "blocks") not in _PLACES:
        yield f"{where}.at={entry['at']}: it is one of {', '.join(_PLACES)}"
    if not isinstance(entry.get("strict", True), bool):
        yield f"{where}.strict={entry['strict']}: expected true or false"
    span = entry.get("layers", [0, 1])
    if (
        not isinstance(span, list)
        or len(span) != 2
        or not all(type(end) is int for end in span)
        or not 0 <= span[0] < span[1]
    ):
        yield f"{where}.layers={span}: expected [first, last], whole numbers, the last one past the range"
    for key in ("match", "not"):
        try:
            if key in entry and (not isinstance(entry[key], str) or matcher(entry[key]) is None):
                yield f"{where}.{key}={entry[key]}: expected a pattern"
        except PatternError as error:
            yield f"{where}.{key}: {error}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_gradient(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _numbers(schedule: Any) -> list[float]:
    """Every number in a schedule."""
    if _is_number(schedule):
        return [schedule]
    return [number for entry in schedule for number in _numbers(entry["value"] if isinstance(entry, dict) else entry)]


def _reached(schedule: list[Any], row: Row, name: str) -> list[float]:
    """Every number that some tensor may get: the default too, where there are conditions on all entries."""
    ends = _is_gradient(schedule) or any(set(entry) <= {"value", "strict"} for entry in schedule)
    return _numbers(schedule) + ([] if ends else [_default(row, name)])


def _largest(schedule: list[Any]) -> float:
    """The number that stands for a schedule where one is asked for."""
    return float(max(_numbers(schedule), key=lambda number: (abs(number), number)))


# -- to the tensors ----------------------------------------------------------------------------------------------------


def resolved(
    params: Any, schedules: Schedules, names: Iterable[str], layer_of: Callable[[str], int], n_layers: int
) -> Callable[[str], Any]:
    """The parameters of every tensor.

    Args:
        params: The method's params dataclass.
        schedules: Of its fields that differ.
        names: The tensors that are merged.
        layer_of: Depth of a tensor: 0 before the blocks, 1 to n, n + 1 after them.
        n_layers: How many blocks there are.

    Raises:
        UserError: A strict entry fits no tensor, a range leaves the model, a tensor has no value, or the method
            refuses a tensor's values; all of it, a line each.
    """
    names = list(names)
    if not schedules:
        return lambda name: params
    places = {name: (layer_of(name), n_layers) for name in names}
    faults: list[str] = []
    columns = {field: _column(field, schedule, places, params, faults) for field, schedule in schedules.items()}
    made: dict[str, Any] = {}
    known: dict[str, Any] = {}  # tensors with the same values share one object
    for name in names if not faults else ():
        own = {field: values[name] for field, values in columns.items()}
        try:
            made[name] = known.setdefault(repr(own), None) or dataclasses.replace(params, **own)
            known[repr(own)] = made[name]
        except ValueError as error:
            faults.append(f"the parameters for {name}: {error}")
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    return made.__getitem__


def table(
    params_of: Callable[[str], Any],
    schedules: Schedules,
    names: Iterable[str],
    layer_of: Callable[[str], int],
    experts: Iterable[str],
) -> list[dict[str, Any]]:
    """What every tensor gets of the parameters that differ, a row each: tensor, layer, a column for each parameter.

    A parameter per expert has a column for each, `weights/NAME`.
    """
    experts = list(experts)
    rows = []
    for name in names:
        row: dict[str, Any] = {"tensor": name, "layer": layer_of(name)}
        for field in schedules:
            value = getattr(params_of(name), field)
            if isinstance(value, list):
                row |= {f"{field}/{expert}": entry for expert, entry in zip(experts, value, strict=True)}
            else:
                row[field] = value
        rows.append(row)
    return rows


Places = Mapping[str, tuple[int, int]]  # tensor -> depth, number of blocks


def _column(field: str, schedule: list[Any], places: Places, params: Any, faults: list[str]) -> dict[str, Any]:
    """The values of one field for every tensor."""
    default: Any = {entry.name: entry.default for entry in dataclasses.fields(params)}[field]
    if isinstance(getattr(params, field), list):
        entries = [
            _values(entry, places, f"method.{field}[{index}]", None, faults)
            if isinstance(entry, list)
            else float(entry)
            for index, entry in enumerate(schedule)
        ]
        return {name: [entry if isinstance(entry, float) else entry[name] for entry in entries] for name in places}
    return _values(schedule, places, f"method.{field}", default, faults)


def _values(
    schedule: list[Any], places: Places, where: str, default: float | None, faults: list[str]
) -> dict[str, float]:
    """The value of one schedule for every tensor."""
    if _is_gradient(schedule):
        return {name: _interpolated(schedule, *place) for name, place in places.items()}
    found: dict[str, float] = {}
    for index, entry in enumerate(schedule):
        span = entry.get("layers")
        depth = next(iter(places.values()), (0, 0))[1]
        if span is not None and span[1] > depth:
            faults.append(f"{where}[{index}].layers={span}: the model has {depth} blocks, [0, {depth}] is all")
            continue
        fitting = [name for name, place in places.items() if _fits(entry, name, *place)]
        if not fitting and entry.get("strict", True) and len(entry) > 1:
            faults.append(f"{where}[{index}]: no tensor fits {_told(entry)}; strict: false allows that")
        for name in fitting:
            value = entry["value"]
            found.setdefault(name, float(value) if _is_number(value) else _interpolated(value, *places[name], span))
    lacking = [name for name in places if name not in found]
    if lacking and default is None:
        faults.append(f"{where}: {len(lacking)} tensors fit no entry, the first {lacking[0]}; end with {{value: ...}}")
    return found | dict.fromkeys(lacking, math.nan if default is None else default)


def _fits(entry: Mapping[str, Any], name: str, depth: int, n_layers: int) -> bool:
    """Whether a tensor meets all conditions of an entry."""
    place = "before" if depth < 1 else "after" if depth > n_layers else "blocks"
    first, last = entry.get("layers", (0, n_layers))
    return (
        entry.get("at", place) == place
        and ("layers" not in entry or first <= depth - 1 < last)
        and ("match" not in entry or matcher(entry["match"])(name))
        and not ("not" in entry and matcher(entry["not"])(name))
    )


def _interpolated(values: list[float], depth: int, n_layers: int, span: Iterable[int] | None = None) -> float:
    """A list's value at a depth; a single block takes its last value.

    >>> [_interpolated([0.0, 1.0], depth, 3) for depth in range(5)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    first, last = span or (0, n_layers)
    way = (depth - 1 - first) / (last - first - 1) if last - first > 1 else float(depth > first)
    position = min(max(way, 0.0), 1.0) * (len(values) - 1)
    lower = min(int(position), len(values) - 1)
    share = position - lower
    upper = min(lower + 1, len(values) - 1)
    return (1 - share) * values[lower] + share * values[upper]


def _told(entry: Mapping[str, Any]) -> str:
    """An entry's conditions in words."""
    return ", ".join(f"{key}: {entry[key]}" for key in ("match", "not", "at", "layers") if key in entry)
