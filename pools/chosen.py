"""What is merged of the members: their layers as slices stack them, and of their tensors those that patterns choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pools.headers import CheckpointError
from pools.picked import Picked, Selected, Tensors, select

Members = dict[str | None, Tensors]  # None is the base
Parts = dict[str, tuple[Tensors, str]]  # name -> the tensors it is among, and its name there


def members_of(base: Tensors | None, experts: Mapping[str, Tensors]) -> Members:
    """Member -> tensors, the base first."""
    return ({None: base} if base is not None else {}) | dict(experts)


def stack(
    members: Members, slices: Sequence[Mapping[str, Any]], gone: Mapping[str | None, list[str]]
) -> tuple[Members, tuple[tuple[str, int], ...]]:
    """Stack layers anew.

    Args:
        members: Base and experts.
        slices: As `pools.views.restack` takes them.
        gone: Member -> names that are in no merged model; those of layers that no slice takes are added.

    Returns:
        The new members, and for each layer the first expert that gives it, and its number there.

    Raises:
        CheckpointError: All that is wrong with the slices, a line each.
    """
    from pools.views import restack

    experts = {name: one for name, one in members.items() if name is not None}
    try:
        stacked = restack(members.get(None), experts, slices)
    except CheckpointError as error:
        raise CheckpointError("\n".join(f"pool.slices: {line}" for line in str(error).splitlines())) from error
    found = members_of(stacked.base, stacked.experts)
    used = {
        (id(source), name) for one in found.values() if isinstance(one, Picked) for source, name in one.parts.values()
    }
    for member, one in members.items():
        gone[member].extend(name for name in one if (id(one), name) not in used)
    return found, stacked.origins


def choose(
    members: Members, patterns: Sequence[str], rest: str, gone: Mapping[str | None, list[str]]
) -> tuple[Members, Parts]:
    """Leave in the members what is merged.

    Args:
        members: Base and experts.
        patterns: Of the names that are merged.
        rest: Who gives the others: `base`, or an expert's name.
        gone: Member -> names that are in no merged model; what others than `rest` have of the rest is added.

    Returns:
        The members with the chosen tensors, and the rest.

    Raises:
        CheckpointError: A pattern fits nothing, or `rest` is no member.
    """
    giver = None if rest == "base" else rest
    if giver not in members:
        known = ", ".join(name or "base" for name in members)
        raise CheckpointError(f"pool.rest={rest} is no member of the pool; known are {known}")
    try:
        names = select(next(iter(members.values())), patterns)
        found: Members = {name: Selected(one, names) for name, one in members.items()}
    except CheckpointError as error:
        raise CheckpointError("\n".join(f"pool.merge: {line}" for line in str(error).splitlines())) from error
    chosen = set(names)
    for member in members.keys() & gone.keys() - {giver}:
        gone[member].extend(name for name in members[member] if name not in chosen)
    return found, {name: (members[giver], name) for name in members[giver] if name not in chosen}
