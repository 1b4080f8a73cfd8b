"""Plain values held to dataclasses: every unknown key, wrong type and refused value of a tree, gathered."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

from harness.config import RunConfig, closest
from methods.kinds import Base, Row, resolve

Tree = dict[str, Any]
MISSING = "???"  # OmegaConf's word for a value that has to be given


@dataclasses.dataclass(frozen=True)
class Sections:
    """The top of the tree as a kind of its own: the kinds of its fields depend on what was chosen."""

    cls: type
    hidden: frozenset[str]  # fields that are no keys
    kinds: Mapping[str, Any]


def inner(kind: Any, name: str) -> Any:
    """The kind of an entry of a kind; None where there is none."""
    if isinstance(kind, Sections):
        return kind.kinds.get(name)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _hints(kind).get(name)
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The kinds of a dataclass's fields."""
    return typing.get_type_hints(cls)


def check(value: Any, kind: Any, path: str, faults: list[str]) -> Any:
    """A value as its kind has it; what is wrong with it is noted among the faults."""
    if isinstance(kind, Sections) or dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            faults.append(f"{path}={_shown(value)}: expected a mapping of keys, got {_shown(value)}")
            return None
        if typing.get_origin(kind) is dict:
            return {str(key): check(entry, inner(kind, key), f"{path}.{key}", faults) for key, entry in value.items()}
        return _construct(kind, value, f"{path}." if path else "", faults)
    try:
        return _convert(value, kind)
    except TypeError:
        faults.append(f"{path}={_shown(value)}: expected {_worded(kind)}, got {_shown(value)}")
        return None


def _convert(value: Any, kind: Any) -> Any:
    """A leaf as its kind has it: whole numbers pass for numbers, numbers for texts, nothing else for anything else.

    Raises:
        TypeError: The value is not of that kind.
    """
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if option is Any or (option is types.NoneType and value is None):
            return value
        if typing.get_origin(option) is list and isinstance(value, list):
            return [_convert(entry, typing.get_args(option)[0]) for entry in value]
        if typing.get_origin(option) is dict and isinstance(value, dict):
            return {str(key): _convert(entry, typing.get_args(option)[1]) for key, entry in value.items()}
        if isinstance(value, bool):
            if option is bool:
                return value
        elif isinstance(value, int | float) and option in (float, str):
            return option(value)
        elif isinstance(option, type) and isinstance(value, option):
            return value
    raise TypeError


def _construct(kind: Any, values: Tree, prefix: str, faults: list[str]) -> Any:
    """Build a dataclass from a mapping; fields that are faulty in themselves keep their defaults meanwhile."""
    cls = kind.cls if isinstance(kind, Sections) else kind
    fields = {field.name: field for field in dataclasses.fields(cls)}
    faults += [f"{prefix}{name}: {_unknown(name, prefix, kind)}" for name in values if name not in fields]
    good: Tree = {}
    faulty: set[str] = set()
    for name in (name for name in fields if values.get(name, MISSING) != MISSING):
        before = len(faults)
        good[name] = check(values[name], inner(kind, name), f"{prefix}{name}", faults)
        if len(faults) > before:
            del good[name]
            faulty.add(name)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if values.get(name, MISSING) == MISSING and (required or name in values):
            faults.append(f"{prefix}{name}: has no value; give one as {prefix}{name}=...")
        if required and name not in good:
            faulty.add(name)
            good[name] = None  # stands in while the other fields are checked
    built, refused = _build(cls, good)
    for line in refused:
        name = line.partition(" ")[0]
        if name in good and name not in faulty:
            faults.append(f"{prefix}{name}={_shown(good[name])}: {line}")
        elif name not in fields:
            faults.append(f"{prefix[:-1]}: {line}")
        elif name not in good and name not in faulty:  # a default does not go with what is given
            faults.append(f"{prefix}{name}: {line}")
    return built


def _build(cls: type, values: Tree) -> tuple[Any, list[str]]:
    """An instance, or what it refuses: of all values together and, to find several, of each one alone."""
    try:
        return cls(**values), []
    except ValueError as error:
        refused = str(error).splitlines()
    except (TypeError, AttributeError):  # a check met the None that stands for a value already found faulty
        return None, []
    for name, value in values.items():
        try:
            cls(**{name: value})
        except ValueError as error:
            refused += str(error).splitlines()
        except TypeError:  # the other fields have no defaults
            break
    return None, list(dict.fromkeys(refused))


def _unknown(name: str, prefix: str, kind: Any) -> str:
    """What to say of a key that does not exist."""
    if not isinstance(kind, Sections):
        known = _names(kind)
        return f"there is no such key; {closest(name, known, {leaf: prefix + leaf for leaf in known})}"
    tops = [key for key in kind.kinds if key not in kind.hidden]
    leaves = {leaf: f"{key}.{leaf}" for key in reversed(tops) for leaf in _names(kind.kinds[key])}
    near = difflib.get_close_matches(name, [*tops, *leaves], n=1)
    return f"there is no such key; {closest(name, near or tops, leaves | {key: key for key in tops})}"


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _worded(kind: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    if typing.get_origin(kind) is list:
        return f"a list, each {_worded(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return "a mapping of keys"
    return (
        " or ".join(map(_worded, typing.get_args(kind))) if typing.get_args(kind) else words.get(kind, "another value")
    )


def narrow(tree: dict[str, Any]) -> list[str]:
    """Restrict the pool of a plain tree to the top-level `experts`, in their order; returns the names it lacks."""
    wanted, pool = tree.get("experts"), tree.get("pool")
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        return []
    if not isinstance(pool, dict) or not isinstance(pool.get("experts"), dict):
        return []
    present = pool["experts"]
    pool["experts"] = {name: present[name] for name in wanted if name in present}
    shown = ",".join(map(str, wanted))
    return [
        f"experts=[{shown}]: the pool {tree['pool_name']} has no expert {name!r}; {closest(str(name), present)}"
        for name in wanted
        if name not in present
    ]


def unfit(config: RunConfig, row: Row) -> list[str]:
    """What does not go together between the sections of a configuration."""
    return [
        *_unfit_experts(config, row),
        *_unfit_splits(config, row),
        *_unfit_learning(config, row),
        *_unfit_preference(config),
    ]


def _unfit_experts(config: RunConfig, row: Row) -> list[str]:
    """The pool against what the method's row asks for."""
    names, where, faults = _merged_experts(config), f"the pool {config.pool_name}", []
    low, high = row.n_experts
    if row.members and not config.pool.slices:
        try:
            resolve(row.members)(config.method, names)
        except ValueError as error:
            name = str(error).partition(" ")[0]
            value = getattr(config.method, name, None)
            faults.append(f"method: {error}" if value is None else f"method.{name}={value}: {error}")
    if len(names) < low:
        faults.append(
            f"{row.name} needs at least {low} expert(s), {where} has {len(names)}; +pool.experts.NAME=PATH adds one"
        )
    if high is not None and len(names) > high:
        some = ",".join(names[:high])
        faults.append(
            f"{row.name} merges at most {high} experts, {where} has {len(names)}; choose with experts=[{some}]"
        )
    if row.base is Base.needed and config.pool.base is None:
        faults.append(f"{row.name} needs a base model, {where} has none; pool.base=PATH names one")
    for name, value in vars(config.method).items():
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if isinstance(value, list) and not texts and len(value) != len(names) and not row.ranges:  # those list layers
            faults.append(f"method.{name} lists {len(value)} numbers for {len(names)} experts; give one for each")
    return faults


def _merged_experts(config: RunConfig) -> tuple[str, ...]:
    """The experts as the method is given them: where layers are stacked anew, one for each that a slice names."""
    first = (config.pool.slices or [{}])[0].get("experts")
    return tuple(map(str, first)) if isinstance(first, dict) else tuple(config.pool.experts)


def _unfit_preference(config: RunConfig) -> list[str]:
    """A preference of a model that is not there."""
    if config.evaluation.preference is None or config.model is not None:
        return []
    return [
        "evaluation.preference is of a model that was made before (model=DIR); method.preference is of one to be made"
    ]


def _unfit_learning(config: RunConfig, row: Row) -> list[str]:
    """What is of learning where nothing is learnt, and a precision that gradients have no range in."""
    learns = row.loss or (row.learns and config.method.steps)
    if not learns and config.adaptation.checkpoint is not None:
        return [f"adaptation.checkpoint is where learning is saved, and {row.name} does not learn step by step"]
    if learns and config.fabric.precision == "16-mixed":
        return [f"fabric.precision=16-mixed: {row.name} learns, and gradients would vanish; use bf16-mixed or 32-true"]
    return []


def _unfit_splits(config: RunConfig, row: Row) -> list[str]:
    """The splits that are read against those that the tasks have."""
    wanted = {"evaluation": config.evaluation.split}
    wanted |= {"adaptation": config.adaptation.split} if row.is_fed(config.method) else {}
    return [
        f"{section}.split={split}: task {name} has no such split; it has {', '.join(task.splits)}"
        for section, split in wanted.items()
        for name, task in config.tasks.tasks.items()
        if split not in task.splits
    ]
