"""What learning saves on the way, and takes up again after it was killed; what is of another run or broken is refused.

A file holds the facts that a result depends on besides what was learnt so far. It appears under its name when it is
complete: whoever is killed meanwhile leaves the last one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.config import UserError

FILE = "learning.pt"  # of what is learnt by Adam
ANSWERS = "answers-*.pt"  # of what finds coefficients in its own way: as many files as there were occasions
_SHOWN = 3  # differences that are told


@dataclass(frozen=True)
class Saved:
    """Where learning is saved, and of what."""

    directory: Path
    every: int  # steps
    resume: bool  # go on with what is there
    facts: Mapping[str, Any] = field(default_factory=dict)  # all that the result depends on, as JSON has it


def refuse(saved: Saved) -> None:
    """Refuse a directory that learning can neither be saved in nor gone on from, before any work is done.

    Raises:
        UserError: It cannot be made, or what is there is of another run, broken, or not to be gone on with.
    """
    try:
        saved.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"adaptation.checkpoint={saved.directory} is no directory to write in: {error}") from error
    for place in sorted([*saved.directory.glob(FILE), *saved.directory.glob(ANSWERS)]):
        read(place, saved)


def write(place: Path, saved: Saved, content: Mapping[str, Any]) -> None:
    """Write a file in the place of the last."""
    partial = place.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save({**content, "facts": json.dumps(saved.facts, sort_keys=True)}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(place)


def read(place: Path, saved: Saved) -> dict[str, Any]:
    """What a file holds.

    Raises:
        UserError: It is broken, of another run, or not to be gone on with.
    """
    if not saved.resume:
        raise UserError(
            f"adaptation.checkpoint={saved.directory}: a checkpoint is there; adaptation.resume=true goes on with it, "
            "or name another directory"
        )
    try:
        content = torch.load(place, map_location="cpu", weights_only=True)
        known = json.loads(content["facts"])
    except Exception as error:  # torch's, pickle's and the archive's
        raise UserError(f"{place} cannot be read as a checkpoint of learning: {str(error).splitlines()[0]}") from error
    told = list(_differences(known, json.loads(json.dumps(saved.facts))))
    if told:
        raise other(place, "; ".join(told[:_SHOWN]) + (f"; {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""))
    return content


def other(place: Path, told: str) -> UserError:
    """What is raised of a checkpoint of another run."""
    return UserError(f"{place} is a checkpoint of another run: it has {told}; name another adaptation.checkpoint")


def _differences(known: Any, own: Any, path: str = "") -> Iterator[str]:
    """Where facts differ, the method first, each in words."""
    if isinstance(known, dict) and isinstance(own, dict):
        for key in sorted({**known, **own}, key=lambda key: (key != "method", key)):
            yield from _differences(known.get(key), own.get(key), f"{path}.{key}" if path else key)
    elif known != own:
        yield f"{path} {_short(known)}, here {_short(own)}"


def _short(fact: Any) -> str:
    """A fact, hashes and long lists cut."""
    text = "nothing" if fact is None else repr(fact)
    return text if len(text) <= 40 else f"{text[:12]}..."
