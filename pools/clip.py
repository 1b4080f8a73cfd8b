"""Pools of CLIP image classifiers: the vision towers are merged, everything around them is the base's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pools.card import model_card
from pools.checkpoint import Checkpoint
from pools.clip_frame import PROJECTION, ClipFrame, ImageEncoder, filled, select_tower
from pools.faults import header_faults, recast, specs_of
from pools.headers import CheckpointError
from pools.roles import ModuleRoles
from pools.write import SHARD_BYTES, Layout, write_directory

if TYPE_CHECKING:
    from PIL.Image import Image

Place = tuple[Path, str]  # where a member is, and what the user calls it


class ClipPool:
    """A base and experts that differ in the vision tower.

    Attributes:
        base: The base's vision tower by name (`vision_model.*`), or None.
        experts: Name -> vision tower, in the user's order.
        frame: The member that everything around the tower is taken from: the base, or without one the first expert
            that is more than a vision tower.
    """

    family = "clip"

    def __init__(self, base: Place | None, experts: Mapping[str, Place]) -> None:
        """Read all headers.

        Args:
            base: Where the base is, and what the user calls it; None for none.
            experts: Name -> the same of an expert.

        Raises:
            CheckpointError: All files that cannot be opened, a line each.
        """
        self.base: Checkpoint | None = None
        self.experts: dict[str, Checkpoint] = {}
        faults: list[str] = []
        members: list[tuple[str | None, Place]] = [(None, base)] if base is not None else []
        for name, (path, source) in [*members, *experts.items()]:
            whose = "base" if name is None else f"expert {name}"
            try:
                member = Checkpoint(path, source, select_tower)
            except CheckpointError as error:
                faults += [f"{whose}: {line}" for line in str(error).splitlines()]
                continue
            if not member:
                faults.append(f"{whose}: {_without_tower(member)}")
            if name is None:
                self.base = member
            else:
                self.experts[name] = member
        if faults:
            raise CheckpointError("\n".join(faults))
        if self.base is None and not self.experts:
            raise CheckpointError("the pool has neither a base nor experts; name at least one of them")
        first = self.reference
        if self.base is None:
            first = next((expert for expert in self.experts.values() if PROJECTION in expert.others), first)
        self.frame = ClipFrame(first.path, first.source)

    @property
    def reference(self) -> Checkpoint:
        """What a merged model has the names, shapes and dtypes of: the base, or without one the first expert."""
        return self.base if self.base is not None else next(iter(self.experts.values()))

    @property
    def roles(self) -> ModuleRoles:
        """What the names of the vision tower mean."""
        return self._roles

    @cached_property
    def _roles(self) -> ModuleRoles:
        return ModuleRoles(self.skeleton(), self.reference)

    @property
    def context_fingerprint(self) -> str:
        """SHA-256 of all that results depend on besides a member's tower: other tensors, tokenizer, processor."""
        return self.frame.fingerprint

    def faults(self) -> list[str]:
        """All that headers and the configuration tell of what cannot be merged or run, a line each."""
        return header_faults(self.base, self.experts) + self.frame.faults()

    def skeleton(self) -> ImageEncoder:
        """The module with parameters on the meta device: structure and buffers without weights."""
        return self.frame.skeleton()

    def module(self, tensors: Mapping[str, torch.Tensor] | None = None) -> ImageEncoder:
        """The image encoder in float32, with weights of its own, in eval mode.

        Args:
            tensors: The vision tower by name, and, if it is not the base's, `visual_projection.weight`; by default the
                base's tower.

        Raises:
            CheckpointError: Tensors are missing, left over or of another shape.
        """
        if tensors is None:
            tensors = self.base
        if tensors is None:
            raise CheckpointError("the pool has no base; say which tensors the module is to have")
        weights = {name: _own_float(tensors, name) for name in tensors}
        if PROJECTION not in weights:
            weights[PROJECTION] = self.frame.needed(PROJECTION).float()
        return filled(self.skeleton(), weights)

    def feed(self, rows: Sequence[Image]) -> dict[str, torch.Tensor]:
        """Images as the module takes them, `pixel_values` (B, 3, H, W); grey and palette images become RGB."""
        return self.frame.feed(rows)

    def head(self, labels: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
        """Zero-shot classifier: logits are the module's output @ head.T (Radford et al. 2021, arXiv:2103.00020).

        A class is the mean, scaled to length one, of the embeddings of its prompts, times exp(logit_scale).

        Args:
            labels: K class names.
            templates: Prompts with one `{}` each, where the class name goes.

        Returns:
            (K, D) float32.

        Raises:
            CheckpointError: A prompt is longer than the text tower reads.
        """
        return self.frame.head(labels, templates)

    def layout(self, lineage: Mapping[str, Any], dtype: torch.dtype | None = None) -> Layout:
        """What a complete `CLIPModel` directory holds: the merged tower and everything around it.

        Args:
            lineage: What the model card tells: `method`, `params`, and whatever else.
            dtype: Of the merged tower's floating tensors; by default the reference's.
        """
        around = self.frame.around
        return Layout(
            specs=recast(specs_of(self.reference), dtype) | specs_of(around),
            around=around,
            copies=tuple(self.frame.settings()),
            texts=lambda: {"README.md": model_card(self.base, self.experts, lineage)},
        )

    def write(
        self,
        directory: Path,
        tensors: Iterable[tuple[str, torch.Tensor]],
        lineage: Mapping[str, Any],
        shard_bytes: int = SHARD_BYTES,
    ) -> list[str]:
        """Write a model directory from merged tensors in memory, in any order; see `layout`.

        Raises:
            CheckpointError: The directory is taken, tensors are missing or of another shape or dtype, or the disk
                cannot hold them.
        """
        return write_directory(Path(directory), self.layout(lineage), tensors, shard_bytes=shard_bytes)


def _without_tower(member: Checkpoint) -> str:
    """What to say of a checkpoint that has no tensor of a vision tower."""
    if any(".lora_" in name for name in member.others):
        return (
            f"{member.source} is a LoRA adapter; make it a model first (peft: merge_and_unload, then save_pretrained)"
        )
    some = ", ".join(member.others[:3]) or "none"
    return f"{member.source} has no CLIP vision tower (vision_model.*); its tensors are {some}, ..."


def _own_float(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor in float32 that shares no memory; what a checkpoint reads is nobody else's already."""
    return tensors[name].to(torch.float32, copy=not isinstance(tensors, Checkpoint))
