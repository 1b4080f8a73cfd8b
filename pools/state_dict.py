"""Pools of state dicts of any architecture, from safetensors or torch files: merged and written, not run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch

from pools.card import model_card
from pools.checkpoint import Checkpoint
from pools.choices import Choices
from pools.chosen import Parts, choose, members_of, stack
from pools.faults import dtype_notes, header_faults, recast, specs_of
from pools.headers import CheckpointError
from pools.language_config import member_faults
from pools.members import Place, open_members, refuse_gguf, whose
from pools.picked import Picked, Tensors
from pools.pickled import SUFFIXES, PickledCheckpoint
from pools.recast import Recast
from pools.roles import NamedRoles
from pools.write import SHARD_BYTES, Layout, write_directory


class StateDictPool:
    """Members that are nothing but tensors by name.

    Attributes:
        base: The base's merged tensors, or None.
        experts: Name -> the same of an expert.
        around: What is written as it is: tensors that are not selected.
        dropped: Member (`base`, or the expert's name) -> what of its file is in no merged model.
    """

    family = "state_dict"

    def __init__(self, base: Place | None, experts: Mapping[str, Place], choices: Choices | None = None) -> None:
        """Read all headers.

        Args:
            base: Where the base is, and what the user calls it; None for none. A `.safetensors` file or a directory,
                or a torch file (`.pt`, `.pth`, `.bin`, `.ckpt`).
            experts: Name -> the same of an expert.
            choices: Of them, which tensors are merged, and slices.

        Raises:
            CheckpointError: All files that cannot be opened, a line each.
        """
        chosen = choices or Choices()
        places: dict[str | None, Place] = ({None: base} if base is not None else {}) | dict(experts)
        opened = self._originals = open_members(places, _open)
        self._found = [
            f"{whose(name)}: {line}"
            for name, one in opened.items()
            for line in member_faults(places[name][1], {}, specs_of(one), True)
        ]
        gone = {name: [*getattr(one, "dropped", ())] for name, one in opened.items()}
        members, rest = dict(opened), Parts()
        try:
            if chosen.slices is not None:
                members, _ = stack(members, chosen.slices, gone)
            if chosen.selects:
                members, rest = choose(members, chosen.merge, chosen.rest, gone)
        except CheckpointError as error:
            self._found += str(error).splitlines()
        self.around = Picked(rest, "what is not merged")
        self.base = members.get(None)
        self.experts = {name: one for name, one in members.items() if name is not None}
        self.dropped = {name or "base": tuple(dict.fromkeys(names)) for name, names in gone.items() if names}

    @property
    def reference(self) -> Tensors:
        """What a merged state dict has the names, shapes and dtypes of: the base, or without one the first expert."""
        return self.base if self.base is not None else next(iter(self.experts.values()))

    @cached_property
    def roles(self) -> NamedRoles:
        """What names hint at."""
        return NamedRoles(specs_of(self.reference))

    @property
    def context_fingerprint(self) -> str:
        """Hash of the tensors that are written as they are."""
        return hashlib.sha256(self.around.fingerprint.encode() if self.around else b"").hexdigest()

    @property
    def notes(self) -> list[str]:
        """What is worth knowing before a merge and forbids nothing, a line each."""
        return dtype_notes({whose(name): one for name, one in members_of(self.base, self.experts).items()})

    def faults(self) -> list[str]:
        """All that headers tell of what cannot be merged, a line each."""
        return self._found + header_faults(self.base, self.experts)

    def skeleton(self) -> NoReturn:
        """A state dict has no module.

        Raises:
            CheckpointError: Always.
        """
        _no_module()

    def module(self, tensors: Mapping[str, torch.Tensor] | None = None) -> NoReturn:
        """A state dict has no module.

        Raises:
            CheckpointError: Always.
        """
        _no_module()

    def feed(self, rows: Sequence[Any]) -> NoReturn:
        """A state dict takes no inputs.

        Raises:
            CheckpointError: Always.
        """
        _no_module()

    def head(self, labels: Sequence[str], templates: Sequence[str]) -> NoReturn:
        """A state dict has no head.

        Raises:
            CheckpointError: Always.
        """
        _no_module()

    def layout(self, lineage: Mapping[str, Any], dtype: torch.dtype | None = None) -> Layout:
        """What the merged directory holds: safetensors and a card.

        Args:
            lineage: What the model card tells: `method`, `params`, and whatever else.
            dtype: Of all floating tensors; by default the reference's.
        """

        def texts() -> dict[str, str]:
            members = dict(self._originals)
            return {"README.md": model_card(members.pop(None, None), members, lineage)}  # type: ignore[arg-type]

        specs = recast(specs_of(self.reference) | specs_of(self.around), dtype)
        return Layout(specs, Recast(self.around, dtype), (), texts)

    def write(
        self,
        directory: Path,
        tensors: Iterable[tuple[str, torch.Tensor]],
        lineage: Mapping[str, Any],
        shard_bytes: int = SHARD_BYTES,
    ) -> list[str]:
        """Write a directory from merged tensors in memory, in any order; see `layout`.

        Raises:
            CheckpointError: The directory is taken, tensors are missing or of another shape or dtype, or the disk
                cannot hold them.
        """
        return write_directory(Path(directory), self.layout(lineage), tensors, shard_bytes=shard_bytes)


def _open(path: Path, source: str) -> Tensors:
    """A member, by what its file is called; in a directory, safetensors before a single torch file."""
    refuse_gguf(path)
    if path.is_dir() and not any(path.glob("*.safetensors")) and not any(path.glob("*.safetensors.index.json")):
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if len(found) > 1:
            told = ", ".join(file.name for file in found[:4])
            raise CheckpointError(f"{path} has {len(found)} torch files ({told}); name the one that is meant")
        path = found[0] if found else path
    return PickledCheckpoint(path, source) if path.suffix in SUFFIXES else Checkpoint(path, source)


def _no_module() -> NoReturn:
    raise CheckpointError(
        "a pool of the family state_dict has no module that could be run or fed: merge with `crucible merge`, or set "
        "tasks=none"
    )
