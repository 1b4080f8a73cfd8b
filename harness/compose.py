"""From conf/ and a list of overrides to a checked `RunConfig`: the only door to Hydra and OmegaConf.

Hydra composes the choices (method, pool, tasks, experiment, debug) and reads the overrides; every key and value is then
held to the dataclasses one at a time, so that all faults are shown at once, each with the closest known name.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from harness.config import ROOT, ConfigError, RunConfig, closest
from harness.schema import Sections, check, inner, narrow
from harness.vary import complete
from harness.veneers import settings
from methods.catalogue import CATALOGUE

CONF = ROOT / "conf"
CHOICES = ("method", "pool", "tasks")  # groups that every run has
DELTAS = ("experiment", "debug")  # groups that change a few values anywhere
PLACES = {"pool/backbone": "pool", "experiment": "_global_", "debug": "_global_"}  # groups not placed by their path
NAMES = {group: f"{group}_name" for group in CHOICES}
UNKNOWN = "?"  # stands for a choice that was found faulty

Tree = dict[str, Any]
Groups = dict[str, str | None]


def compose(overrides: Sequence[str] = (), *, config_dir: Path | None = None) -> RunConfig:
    """Compose a configuration.

    Args:
        overrides: Hydra's `key=value`, such as `method=ties`, `method.density=0.3`, `+pool.experts.mine=path`.
            `pool`, `tasks` and `experiment` also take the path of a YAML file.
        config_dir: A directory laid out like conf/ whose choices are offered too.

    Raises:
        ConfigError: Something is unknown, mistyped or refused; the message lists all of it.
    """
    faults: list[str] = []
    folders = _folders(config_dir, faults)
    groups, values = _sort(overrides, folders, faults)
    return _finish(_hydra("config", groups, folders, faults), values, faults)


def from_yaml(text: str, overrides: Sequence[str] = (), *, config_dir: Path | None = None) -> RunConfig:
    """Rebuild the configuration that `to_yaml` wrote, with overrides on top.

    Raises:
        ConfigError: As for `compose`, or the text is no configuration of a run.
    """
    faults: list[str] = []
    folders = _folders(config_dir, faults)
    groups, values = _sort(overrides, folders, faults)
    saved = _saved(text)
    replaced = [group for group in CHOICES if group in groups]
    names = {NAMES[group]: saved.pop(NAMES[group]) for group in CHOICES}
    kept = {key: value for key, value in saved.items() if key not in replaced}
    defaults = [
        *({group: MISSING} for group in replaced),
        "_self_",
        *({f"optional {group}@_global_": None} for group in DELTAS),
    ]
    ConfigStore.instance().store(name="saved", node={"defaults": defaults, **kept})
    tree = _hydra("saved", groups, folders, faults)
    for key, name in names.items():
        if key not in tree:
            tree[key] = name
    return _finish(tree, values, faults)


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, from which `from_yaml` makes the same again; packaged paths stay portable."""
    return OmegaConf.to_yaml(OmegaConf.create(_tree(config)))


def flat(config: RunConfig) -> dict[str, str]:
    """Every leaf by its dotted key, as text; `method`, `pool` and `tasks` are the names of the choices."""
    tree = _tree(config)
    names = {group: tree.pop(name) for group, name in NAMES.items()}
    return names | dict(_leaves(tree))


def choices(group: str, *, config_dir: Path | None = None) -> dict[str, Path]:
    """The names that `group=` takes, with the file of each."""
    folders = [CONF, *([config_dir] if config_dir else [])]
    return {path.stem: path for folder in reversed(folders) for path in sorted((folder / group).glob("*.yaml"))}


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _tree(config: RunConfig) -> Tree:
    """The configuration as it is written: schedules in the places of the numbers that stand for them."""
    tree = _portable(dataclasses.asdict(config))
    tree["method"] |= tree.pop("schedules")
    tree["veneer"] = {name: tree["veneer"][name] for name in config.veneers}
    return tree


def _portable(tree: Any) -> Any:
    """The same values, with paths inside this package written as `${package:...}`."""
    if isinstance(tree, dict):
        return {key: _portable(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_portable(value) for value in tree]
    if isinstance(tree, str) and tree.startswith(f"{ROOT}/"):
        return f"${{package:{Path(tree).relative_to(ROOT).as_posix()}}}"
    return tree


# -- what was asked for ------------------------------------------------------------------------------------------------


def _folders(config_dir: Path | None, faults: list[str]) -> list[Path]:
    """Where choices are looked up."""
    if config_dir is not None and not config_dir.is_dir():
        faults.append(f"--config-dir {config_dir}: there is no such directory")
        return [CONF]
    return [CONF] if config_dir is None else [CONF, config_dir.resolve()]


def _saved(text: str) -> Tree:
    """What `to_yaml` wrote, as a plain tree."""
    try:
        saved = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # PyYAML's and OmegaConf's
        raise ConfigError([f"the saved configuration is not readable as YAML: {error}"]) from error
    lacking = [name for name in NAMES.values() if not isinstance(saved, dict) or name not in saved]
    if lacking or not isinstance(saved, dict):
        raise ConfigError([f"the saved configuration lacks {', '.join(lacking)}: crucible did not write it"])
    return {str(key): value for key, value in saved.items()}


def _sort(overrides: Sequence[str], folders: list[Path], faults: list[str]) -> tuple[Groups, list[Override]]:
    """Split overrides into choices, by group, and values; what cannot be meant is noted among the faults."""
    groups: Groups = {}
    values: list[Override] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            key, equals, value = text.partition("=")
            how = f"special characters need quotes inside the word: {key}='{value}'" if equals else "write key=value"
            faults.append(f"{text}: this cannot be read; {how}")
            continue
        key = override.key_or_group
        if not key or override.package is not None:
            faults.append(f"{text}: this cannot be read; write key=value")
        elif override.is_sweep_override():
            faults.append(
                f"{text}: one run takes one value; a list is written {key}=[a,b], a text with commas {key}='a,b'"
            )
        elif override.is_delete() or "." in key or not any((folder / key).is_dir() for folder in folders):
            values.append(override)
        else:
            groups[key] = _choice(key, override.value(), folders, faults)
    return groups, values


def _choice(group: str, choice: Any, folders: list[Path], faults: list[str]) -> str | None:
    """The name of a choice of a group, UNKNOWN if there is none."""
    if choice is None and group in DELTAS:
        return None
    known = sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
    if str(choice) in known:
        return str(choice)
    if str(choice).endswith((".yaml", ".yml")) and group != "method":
        return _store_file(group, Path(str(choice)), faults)
    faults.append(f"{group}={choice}: no {group} is called {str(choice)!r}; {closest(str(choice), known)}")
    return UNKNOWN


def _store_file(group: str, path: Path, faults: list[str]) -> str:
    """Offer a user's own file as a choice of a group."""
    try:
        node = OmegaConf.load(path)
    except Exception as error:  # the file system's, PyYAML's and OmegaConf's
        faults.append(f"{group}={path}: the file cannot be read as YAML: {error}")
        return UNKNOWN
    ConfigStore.instance().store(group=group, name=f"file {path.stem}", node=node)
    return f"file {path.stem}"


def _hydra(primary: str, groups: Groups, folders: list[Path], faults: list[str]) -> DictConfig:
    """Compose the choices; the section of a faulty one is None."""
    faulty = [group for group, choice in groups.items() if choice == UNKNOWN]
    fallback = {group: next(iter(choices(group))) for group in faulty if primary != "config" and group in CHOICES}
    asked = {group: choice for group, choice in groups.items() if choice and group not in faulty} | fallback
    keys = {group: f"{group}@{PLACES[group]}" if group in PLACES else group for group in asked}
    lines = [f"{keys[group]}={_quoted(choice)}" for group, choice in asked.items()]
    lines += [f"hydra.searchpath=[{','.join(_quoted(f'file://{folder}') for folder in folders[1:])}]"]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose(primary, overrides=lines, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError([*faults, str(error)]) from error
    chosen = composed.hydra.runtime.choices
    OmegaConf.set_struct(composed, False)
    OmegaConf.set_readonly(composed, False)
    del composed["hydra"]
    for group, name in NAMES.items():
        if group in faulty:
            composed[group], composed[name] = None, UNKNOWN
        elif chosen.get(group) is not None:
            composed[name] = chosen[group].removeprefix("file ")
        elif group in chosen:  # an experiment has taken the choice out, to give all of the section itself
            composed.setdefault(name, "unnamed")
    return composed


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# -- from values to a checked configuration ----------------------------------------------------------------------------


def _finish(tree: DictConfig, values: list[Override], faults: list[str]) -> RunConfig:
    """Apply the overrides of values, then hold every key and value to the dataclasses."""
    faulty = {group for group in CHOICES if tree[NAMES[group]] == UNKNOWN}
    row = CATALOGUE.get(tree.method_name)
    if row is None and "method" not in faulty:
        faulty.add("method")
        faults.append(f"method={tree.method_name}: it is in conf/method but not in methods/catalogue.py")
    params = row.load_params() if row is not None else None
    hints = typing.get_type_hints(RunConfig) | {"method": params, "veneer": settings()} | dict.fromkeys(faulty, Any)
    kinds = Sections(RunConfig, frozenset({*NAMES.values(), "schedules"}), hints)
    for override in values:
        if override.key_or_group.partition(".")[0] not in faulty:
            _apply(tree, override, kinds, faults)
    plain = _plain(tree, faults)
    if "pool" not in faulty:
        faults += narrow(plain)
    if "schedules" in plain:
        faults.append("schedules: there is no such key; a schedule is written in the place of a method's number")
    config = complete(plain, row, kinds, faults) if row else check(plain | {"schedules": {}}, kinds, "", faults)
    if faults:
        raise ConfigError(faults)
    return config


def _apply(tree: DictConfig, override: Override, kinds: Sections, faults: list[str]) -> None:
    """Set, add or remove one value; unknown keys of the schema are found later, with those of the files."""
    path = override.key_or_group
    parent, _, name = path.rpartition(".")
    kind: Any = kinds
    for part in parent.split(".") if parent else []:
        kind = inner(kind, part)
    entries = OmegaConf.select(tree, parent) if parent else tree
    is_open = typing.get_origin(kind) is dict
    known = list(entries) if isinstance(entries, DictConfig) else []
    if path in NAMES.values():
        faults.append(f"{path}: there is no such key; the choice is written {path.removesuffix('_name')}=...")
    elif override.is_delete() and is_open and name in known:
        del entries[name]
    elif override.is_delete():
        faults.append(f"~{path}: only a present entry of a mapping can be removed, such as pool.experts.NAME")
    elif is_open and name not in known and not (override.is_add() or override.is_force_add()):
        faults.append(f"{path}: {parent} has no {name!r}; {closest(name, map(str, known))}; +{path}=... adds it")
    else:
        OmegaConf.update(tree, path, override.value(), merge=True, force_add=True)


def _plain(tree: DictConfig, faults: list[str]) -> Tree:
    """The tree as plain values, interpolations resolved."""
    OmegaConf.register_new_resolver("package", lambda path: str(ROOT / path), replace=True)
    plain: Tree = {}
    for key in map(str, tree):
        try:
            section = OmegaConf.select(tree, key)
            plain[key] = OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
        except OmegaConfBaseException as error:
            faults.append(f"{key}: {str(error).splitlines()[0]}")
    return plain
