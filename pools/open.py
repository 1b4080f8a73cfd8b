"""Opens a pool by its family."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pools.choices import Choices
from pools.clip import ClipPool
from pools.headers import CheckpointError
from pools.language import CausalLMPool, Seq2SeqPool, SequenceClassificationPool
from pools.locate import Resolve, locate
from pools.picked import Tensors
from pools.roles import ModuleRoles, NamedRoles
from pools.state_dict import StateDictPool
from pools.write import Layout

FAMILIES: dict[str, Any] = {
    "clip": ClipPool,
    "causal_lm": CausalLMPool,
    "seq2seq": Seq2SeqPool,
    "sequence_classification": SequenceClassificationPool,
    "state_dict": StateDictPool,
}
_TAKEN = {"clip": (), "state_dict": ("merge", "rest", "slices")}  # choices of those that do not take all of them


class Pool(Protocol):
    """Models of one family: read lazily, checked from their headers, run, fed and written."""

    base: Tensors | None
    experts: dict[str, Tensors]
    family: str

    @property
    def roles(self) -> ModuleRoles | NamedRoles:
        """What the tensors' names mean."""
        ...

    @property
    def context_fingerprint(self) -> str:
        """Content hash of all that results depend on besides the merged tensors."""
        ...

    def faults(self) -> list[str]:
        """All that headers tell of what cannot be merged or run, a line each."""
        ...

    def layout(self, lineage: Mapping[str, Any], dtype: torch.dtype | None = None) -> Layout:
        """What a merged model's directory holds."""
        ...

    def skeleton(self) -> nn.Module:
        """The module with parameters on the meta device."""
        ...

    def module(self, tensors: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """A module with the tensors, by default the base's, in float32 memory of its own."""
        ...

    def feed(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Rows as the module's keyword inputs."""
        ...

    def head(self, labels: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
        """What turns the module's outputs into logits, (K, D)."""
        ...

    def write(
        self,
        directory: Path,
        tensors: Iterable[tuple[str, torch.Tensor]],
        lineage: Mapping[str, Any],
        shard_bytes: int = ...,
    ) -> list[str]:
        """Write a complete model directory; returns the files' names."""
        ...


def open_pool(
    family: str,
    base: str | None,
    experts: Mapping[str, str],
    root: str | os.PathLike[str] | None = None,
    resolve: Resolve | None = None,
    **choices: Any,
) -> Pool:
    """Find all members and read their headers.

    Args:
        family: Of `FAMILIES`.
        base: A member as `locate` takes it, or None.
        experts: Name -> member, in the order that counts where order does.
        root: A directory laid out like the hub, to read instead of it.
        resolve: Gives the directory of `models:/` and `runs:/` members.
        choices: Fields of `pools.choices.Choices`.

    Raises:
        CheckpointError: All members that cannot be found or opened, a line each; or the family does not take a choice.
    """
    if family not in FAMILIES:
        raise CheckpointError(f"family is one of {', '.join(FAMILIES)}; got {family!r}")
    chosen = Choices(**choices)
    strange = [name for name in chosen.given() if name not in _TAKEN.get(family, chosen.given())]
    if strange:
        told = ", ".join(f"pool.{name}" for name in strange)
        raise CheckpointError(f"{told}: pools of the family {family} do not take that; leave it out")
    members = ({None: base} if base is not None else {}) | dict(experts)
    found: dict[str | None, tuple[Path, str]] = {}
    faults: list[str] = []
    for name, member in members.items():
        try:
            found[name] = locate(member, root, resolve, chosen.trust_remote_code), member
        except CheckpointError as error:
            faults.append(f"{'base' if name is None else f'expert {name}'}: {error}")
    if faults:
        raise CheckpointError("\n".join(faults))
    base_place = found.pop(None, None)
    places = {str(name): place for name, place in found.items()}
    return FAMILIES[family](base_place, places) if family == "clip" else FAMILIES[family](base_place, places, chosen)
