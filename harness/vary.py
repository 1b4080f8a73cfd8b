"""A configuration with some values replaced, held to the same checks, without composing anew: milliseconds."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from harness.config import ConfigError, RunConfig, closest
from harness.schedules import refused, split
from harness.schema import Sections, check, narrow, unfit
from harness.veneers import faults as refused_veneers
from harness.veneers import settings
from methods.catalogue import find
from methods.kinds import Row

Tree = dict[str, Any]
HIDDEN = frozenset({"method_name", "pool_name", "tasks_name", "schedules"})  # fields that are no keys


def vary(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The configuration with other values under some of its dotted keys, `method.scale` or `seed`.

    Raises:
        ConfigError: A key is unknown, or a value is refused; all of it.
    """
    faults: list[str] = []
    row = find(config.method_name)
    tree = dataclasses.asdict(config)
    tree["method"] |= tree.pop("schedules")
    for key, value in values.items():
        _set(tree, key, copy.deepcopy(value), faults)
    faults += narrow(tree)
    varied = complete(tree, row, sections(row), faults)
    if faults:
        raise ConfigError(faults)
    return varied


def sections(row: Row) -> Sections:
    """What the top of a configuration with this method holds."""
    hints = typing.get_type_hints(RunConfig) | {"method": row.load_params(), "veneer": settings()}
    return Sections(RunConfig, HIDDEN, hints)


def complete(plain: Tree, row: Row, kinds: Sections, faults: list[str]) -> Any:
    """The configuration of a plain tree, schedules split off and every value checked; faults are noted."""
    plain["method"], schedules = split(plain.get("method"), row, faults)
    config = check(plain | {"schedules": schedules}, kinds, "", faults)
    if not faults:
        faults += [*unfit(config, row), *refused_veneers(row, config.veneers), *refused(config.method, schedules, row)]
    return config


def value_of(config: RunConfig, key: str) -> Any:
    """What stands under a dotted key.

    Raises:
        KeyError: There is no such key; the message names the closest.
    """
    node: Any = dataclasses.asdict(config)
    node["method"] |= node.pop("schedules")
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node or part in HIDDEN:
            known = [name for name in node if name not in HIDDEN] if isinstance(node, dict) else []
            above = key.rpartition(part)[0]
            raise KeyError(
                f"{key}: there is no such key; {closest(part, known, {name: above + name for name in known})}"
            )
        node = node[part]
    return node


def _set(tree: Tree, key: str, value: Any, faults: list[str]) -> None:
    """Put a value under a dotted key; its last part may be new, and is then found by the checks."""
    *above, name = key.split(".")
    node: Any = tree
    for part in above:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or (not above and name in HIDDEN):
        faults.append(f"{key}: there is no such key")
        return
    node[name] = value
