"""Mixtures of experts with some of the experts left out of every layer, as the pool's members."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pools.chosen import Members
from pools.faults import specs_of
from pools.headers import CheckpointError
from pools.moe import Routers
from pools.moe_targets import MIXTURES
from pools.picked import Picked, Tensors, name_of

_EXPERT = re.compile(r"^(.*\.(?:block_sparse_moe|mlp))\.experts\.(\d+)\.(.+)$")
_COUNTS = ("num_local_experts", "num_experts")  # of config.json; one of them is there


def mixtures(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, int]:
    """Path of each layer's mixture of experts, in order of depth, and how many experts it has.

    Raises:
        CheckpointError: The model has none.
    """
    found: dict[str, int] = {}
    if config.get("model_type") in MIXTURES:
        for match in filter(None, map(_EXPERT.match, tensors)):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    if not found:
        raise CheckpointError(
            f"{name_of(tensors)} is of the model_type {config.get('model_type')!r} and has no mixtures of experts "
            f"(experts.N in a feed-forward block) whose experts can be left out; such are models of "
            f"{', '.join(MIXTURES)}"
        )
    return dict(sorted(found.items(), key=lambda item: [int(part) for part in re.findall(r"\d+", item[0])]))


def thin(
    members: Members, config: Mapping[str, Any], kept: Sequence[Sequence[int]], gone: Mapping[str | None, list[str]]
) -> tuple[Members, dict[str, Any]]:
    """Leave experts out.

    Args:
        members: Base and experts, all of one architecture.
        config: The first member's config.json.
        kept: For each layer with a mixture, which experts are kept, as many in each.
        gone: Member -> names that are in no merged model; those of experts that are left out are added.

    Returns:
        The members, and what changes in the configuration.

    Raises:
        CheckpointError: There are no mixtures, or other experts than are asked for.
    """
    first = next(iter(members.values()))
    paths = mixtures(first, config)
    counts = {len(own) for own in kept}
    if len(kept) != len(paths) or len(counts) != 1:
        raise CheckpointError(
            f"experts are kept in {len(kept)} layers, {sorted(counts)} of each; {name_of(first)} has mixtures in "
            f"{len(paths)} layers, and every one keeps as many"
        )
    chosen = {path: list(own) for path, own in zip(paths, kept, strict=True)}
    for path, own in chosen.items():
        if len(set(own)) < len(own) or not set(own) <= set(range(paths[path])):
            raise CheckpointError(f"{path} has experts 0 to {paths[path] - 1}, and those kept are {own}")
    found = {member: _thinned(tensors, chosen) for member, tensors in members.items()}
    for member, tensors in members.items():
        left = {inner for _, inner in found[member].parts.values()}
        gone[member].extend(name for name in tensors if name not in left)
    usual = MIXTURES[config["model_type"]].count
    return dict(found), dict.fromkeys([key for key in _COUNTS if key in config] or [usual], counts.pop())


def _thinned(tensors: Tensors, chosen: Mapping[str, Sequence[int]]) -> Picked:
    """One member with its experts counted anew."""
    parts: dict[str, tuple[Tensors, str]] = {}
    gates = {f"{path}.gate.weight": list(own) for path, own in chosen.items()}
    lacking = [name for name in gates if name not in specs_of(tensors)]
    if lacking:
        raise CheckpointError(f"{name_of(tensors)} has no router {', '.join(lacking)}")
    routers = Routers({name: tensors[name][own] for name, own in gates.items()})
    for name in tensors:
        match = _EXPERT.match(name)
        if match and int(match[2]) in chosen[match[1]]:
            number = list(chosen[match[1]]).index(int(match[2]))
            parts[f"{match[1]}.experts.{number}.{match[3]}"] = (tensors, name)
        elif not match:
            parts[name] = (routers if name in gates else tensors, name)
    return Picked(parts, f"{name_of(tensors)} with fewer experts")
