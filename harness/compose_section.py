"""A section beside the configuration of a run, from files and overrides; with compose.py the gate to OmegaConf."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from harness.compose import CONF
from harness.config import ROOT, ConfigError, RunConfig, closest
from harness.schema import check

T = TypeVar("T")
DEFAULT = "default"  # the choice that holds every value; the others hold what differs


def split_section(overrides: Sequence[str], group: str, kind: type) -> tuple[list[str], list[str]]:
    """Overrides of a section, and the others.

    A key of the section that the configuration of a run does not have may be given short: `trials=50`.

    >>> from dataclasses import make_dataclass
    >>> kind = make_dataclass("S", ["trials", "workers"])
    >>> split_section(["trials=5", "method=ties", "study.workers=2"], "study", kind)
    (['study.trials=5', 'study.workers=2'], ['method=ties'])
    """
    taken = {field.name for field in dataclasses.fields(RunConfig)}
    short = {field.name for field in dataclasses.fields(kind)} - taken
    own, others = list[str](), list[str]()
    for text in overrides:
        key = text.partition("=")[0].lstrip("+~")
        if key == group or key.startswith(f"{group}."):
            own.append(text)
        elif key.partition(".")[0] in short:
            own.append(f"{group}.{text.lstrip('+~')}")
        else:
            others.append(text)
    return own, others


def section(
    kind: type[T],
    group: str,
    overrides: Sequence[str] = (),
    *,
    config_dir: Path | None = None,
    spelled: Mapping[str, str] | None = None,
) -> T:
    """Compose a section: conf/<group>/default.yaml, what a choice changes, what overrides change.

    Args:
        kind: The section's dataclass.
        group: Its name, `study`: `study=NAME` chooses a file, or a path of one; `study.trials=5` sets a value.
        overrides: Of this section alone.
        config_dir: A directory laid out like conf/ whose choices are offered too.
        spelled: Keys that are no name in Python -> the field's name.

    Raises:
        ConfigError: Something is unknown, mistyped or refused; the message lists all of it.
    """
    faults: list[str] = []
    tree = _load(CONF / group / f"{DEFAULT}.yaml", group, faults)
    values = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            faults.append(f"{text}: this cannot be read; special characters need quotes inside the word: key='...'")
            continue
        if override.key_or_group == group:
            chosen = _load(_file(group, str(override.value()), config_dir, faults), group, faults)
            tree.merge_with(chosen)
        elif override.is_sweep_override() or override.is_delete():
            faults.append(f"{text}: write {override.key_or_group}=value; a list is [a,b]")
        else:
            values.append((override.key_or_group.removeprefix(f"{group}."), override.value()))
    for key, value in values:
        OmegaConf.update(tree, key, value, merge=True, force_add=True)
    OmegaConf.register_new_resolver("package", lambda path: str(ROOT / path), replace=True)
    plain = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(plain, dict)
    renamed = {(spelled or {}).get(str(key), str(key)): value for key, value in plain.items()}
    made = check(renamed, kind, group, faults)
    if faults:
        raise ConfigError(faults)
    return made


def _file(group: str, choice: str, config_dir: Path | None, faults: list[str]) -> Path | None:
    """The file of a choice."""
    if choice.endswith((".yaml", ".yml")):
        return Path(choice)
    folders = [CONF, *([config_dir] if config_dir else [])]
    known = {path.stem: path for folder in folders for path in sorted((folder / group).glob("*.yaml"))}
    if choice not in known:
        faults.append(f"{group}={choice}: no {group} is called {choice!r}; {closest(choice, known)}")
    return known.get(choice)


def _load(path: Path | None, group: str, faults: list[str]) -> DictConfig:
    """A file's values; none where it cannot be read."""
    if path is None:
        return OmegaConf.create({})
    try:
        node = OmegaConf.load(path)
    except Exception as error:  # the file system's, PyYAML's and OmegaConf's
        faults.append(f"{group}={path}: the file cannot be read as YAML: {error}")
        return OmegaConf.create({})
    if not isinstance(node, DictConfig):
        faults.append(f"{group}={path}: expected keys and values")
        return OmegaConf.create({})
    return node
