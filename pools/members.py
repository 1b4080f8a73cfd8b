"""Opens all members of a pool before it says what is wrong with any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pools.headers import CheckpointError
from pools.picked import Tensors

Place = tuple[Path, str]  # where a member is, and what the user calls it
Open = Callable[[Path, str], Tensors]


def whose(member: str | None) -> str:
    """How messages call a member.

    >>> whose(None), whose("math")
    ('base', 'expert math')
    """
    return "base" if member is None else f"expert {member}"


def open_members(places: Mapping[str | None, Place], open_one: Open) -> dict[str | None, Tensors]:
    """Open each member.

    Args:
        places: Member -> place; None is the base.
        open_one: Opens what is at a path, given what the user calls it.

    Raises:
        CheckpointError: All that cannot be opened, a line each; or there are no members.
    """
    if not places:
        raise CheckpointError("the pool has neither a base nor experts; name at least one of them")
    opened: dict[str | None, Tensors] = {}
    faults: list[str] = []
    for member, (path, source) in places.items():
        try:
            opened[member] = open_one(path, source)
            if not opened[member]:
                faults.append(f"{whose(member)}: {source} has no tensors")
        except CheckpointError as error:
            faults += [f"{whose(member)}: {line}" for line in str(error).splitlines()]
    if faults:
        raise CheckpointError("\n".join(faults))
    return opened


def refuse_gguf(path: Path) -> None:
    """Refuse GGUF files by name.

    Raises:
        CheckpointError: The path is one, or a directory that has no weights but such.
    """
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    found = [file.name for file in files if file.suffix == ".gguf"]
    if found and not any(file.suffix == ".safetensors" for file in files):
        raise CheckpointError(
            f"{path} holds weights as GGUF ({', '.join(found[:3])}), which is mostly quantised and not read here; "
            "name the model it was converted from"
        )
