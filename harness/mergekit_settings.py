"""Values of mergekit's parameters as schedules of ours (harness/schedules.py).

mergekit's lists run over the layers of a slice, and what lies outside the layers takes their first value; its filters
are parts of names, the first that fits counts, and where none fits the next level is asked. Ours run over the blocks of
the model or over a range of them, and what follows the blocks takes the last value: entries `at: after` say otherwise.
"""

from __future__ import annotations

import glob
import itertools
from typing import Any

Entry = dict[str, Any]  # {match: glob, value: number or list}; without `match` it fits all


class SettingError(ValueError):
    """A value that mergekit would not take, or that has no counterpart."""


def entries(chain: list[Any]) -> list[Entry]:
    """The levels' values, the first of them first, as entries; what comes after one without conditions never counts.

    Raises:
        SettingError: A value is no number, list of numbers or list of filters.

    >>> entries([[{"filter": "mlp", "value": 0.5}], [0, 1]])
    [{'match': '*mlp*', 'value': 0.5}, {'value': [0.0, 1.0]}]
    """
    found: list[Entry] = []
    for setting in chain:
        for entry in _of_level(setting):
            found.append(entry)
            if "match" not in entry:
                return found
    return found


def _of_level(setting: Any) -> list[Entry]:
    """One level's value as entries."""
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting, list) and setting and all(isinstance(one, dict) for one in setting):
        return [_conditional(one) for one in setting]
    return [{"value": _number_or_list(setting)}]


def _conditional(given: dict[str, Any]) -> Entry:
    unknown = set(given) - {"filter", "value"}
    if unknown or "value" not in given:
        raise SettingError(f"an entry with a filter has the keys filter and value, got {', '.join(map(str, given))}")
    value, part = _number_or_list(given["value"]), given.get("filter")
    return {"value": value} if part in (None, "*") else {"match": f"*{glob.escape(str(part))}*", "value": value}


def _number_or_list(value: Any) -> float | list[float]:
    if isinstance(value, list) and value:
        return [_number(one) for one in value]
    return _number(value)


def _number(value: Any) -> float:
    """A number; YAML 1.1 reads 1e-5 as a text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise SettingError(f"expected a number, a list of numbers or of filters, got {value!r}")
    try:
        return float(value)
    except ValueError as error:
        raise SettingError(f"expected a number, got {value!r}") from error


def schedule(columns: list[list[Entry]], lengths: list[int] | None) -> Any:
    """A number, or a schedule of ours.

    Args:
        columns: For each slice its entries, the last of each without conditions.
        lengths: How many layers each slice has; None where there are no slices.

    >>> schedule([[{"value": [0.0, 1.0]}]], None)
    [{'at': 'after', 'value': 0.0, 'strict': False}, {'value': [0.0, 1.0]}]
    >>> schedule([[{"value": 0.5}], [{"value": 0.5}]], [2, 2])
    0.5
    """
    flat = not any(isinstance(entry["value"], list) for column in columns for entry in column)
    if len(columns) == 1 or (flat and all(column == columns[0] for column in columns)):
        found = [made for entry in columns[0] for made in _outside(entry)]
    else:
        ends = list(itertools.accumulate(lengths or []))
        spans = zip([0, *ends], ends, columns, strict=False)
        found = [{**entry, "at": "before", "value": _first(entry["value"])} for entry in columns[0]]
        found += [{**entry, "layers": [start, end]} for start, end, column in spans for entry in column]
        found += [{**entry, "at": "after", "value": _first(entry["value"])} for entry in columns[-1]]
    found = [entry if len(entry) == 1 else {**entry, "strict": False} for entry in map(_ordered, found)]
    only = found[0]["value"]
    return only if len(found[0]) == 1 and not isinstance(only, list) else found


def _outside(entry: Entry) -> list[Entry]:
    """What mergekit does with a list behind the layers, ahead of the entry itself."""
    if not isinstance(entry["value"], list) or entry["value"][0] == entry["value"][-1]:
        return [entry]
    return [{**entry, "at": "after", "value": entry["value"][0]}, entry]


def _first(value: float | list[float]) -> float:
    return value[0] if isinstance(value, list) else value


def _ordered(entry: Entry) -> Entry:
    """Conditions first, the value last."""
    return {key: entry[key] for key in ("match", "at", "layers", "value") if key in entry}
