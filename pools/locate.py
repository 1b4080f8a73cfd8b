"""From what the user calls a member to a local directory: a path, a hub id, or a model of the tracker."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pools.headers import CheckpointError, closest_sibling

# Weights in the one format that is read, and the small files around them; no pickles, and code only where asked.
PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_TRACKED = ("models:/", "runs:/")
_TIMEOUT_S = 10.0  # until the hub answers

Resolve = Callable[[str], Path]


def locate(
    member: str, root: str | os.PathLike[str] | None = None, resolve: Resolve | None = None, code: bool = False
) -> Path:
    """Find the files of a member.

    Args:
        member: `models:/...` or `runs:/...`; an absolute path, or one that starts with `~`, `./` or `../`; a relative
            path; a hub id `org/name`, or `org/name@revision`.
        root: With it, hub ids and relative paths are looked up as root/<member> and nowhere else; a revision is
            looked up as root/<org>/<name>@<revision> first, then as root/<org>/<name>.
        resolve: Gives the directory of `models:/` and `runs:/` members.
        code: Python files may come from the hub too.

    Raises:
        CheckpointError: There is nothing of that name; the message says where it was looked for.
    """
    if member.startswith(_TRACKED):
        if resolve is None:
            raise CheckpointError(f"{member} names a model of a tracker, and none is connected; give a path instead")
        return Path(resolve(member))
    place = Path(member).expanduser()
    if place.is_absolute() or member.startswith(("./", "../")):
        return _existing(place, member)
    name, _, revision = member.partition("@")
    if root is not None:
        rooted = Path(root).expanduser()
        return rooted / member if (rooted / member).exists() else _existing(rooted / name, member)
    if place.exists():
        return place
    if _HUB_ID.match(name):
        return _from_hub(name, revision or None, (*PATTERNS, "*.py") if code else PATTERNS)
    return _existing(place, member)


def is_hub_id(member: str) -> bool:
    """Whether a member is written like a hub id, `org/name` or `org/name@revision`.

    >>> is_hub_id("openai/clip-vit-base-patch32@main"), is_hub_id("./org/name"), is_hub_id("base")
    (True, False, False)
    """
    return bool(_HUB_ID.match(member.partition("@")[0])) and not member.startswith(_TRACKED)


def _existing(place: Path, member: str) -> Path:
    if place.exists():
        return place
    called = "" if str(place) == member else f", the place of {member}"
    raise CheckpointError(f"there is no checkpoint at {place}{called}{closest_sibling(place)}")


def _from_hub(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot in the hub's own cache, downloaded if it is not there yet.

    Raises:
        CheckpointError: The hub has no such repository or revision, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    called = f"{name}@{revision}" if revision else name
    local = f"to use a local copy, give its path instead, or put it under ROOT/{name} and set root=ROOT"
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), etag_timeout=_TIMEOUT_S, local_files_only=_offline()
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{called} asks for its terms to be accepted on the hub, with a login; {local}"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} is on the hub, and has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a local path nor, for this login, a model on the hub; {local}"
        ) from error
    except Exception as error:  # whatever the hub's HTTP client raises, and that has changed between versions
        why = "the hub is switched off (HF_HUB_OFFLINE)" if _offline() else f"the hub does not answer ({_first(error)})"
        raise CheckpointError(f"{called} is not in the hub's cache, and {why}; {local}") from error
    return Path(found)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first(error: BaseException) -> str:
    """The first line of an error, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
