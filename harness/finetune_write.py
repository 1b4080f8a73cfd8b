"""An expert as it is written: a whole model of the family, or a LoRA adapter in peft's layout."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pools.faults import specs_of
from pools.language_frame import quiet
from pools.partial import partial_directory
from pools.write import write_directory

CONFIG = "config.json"


@dataclass(frozen=True)
class Learnt:
    """What training has left."""

    module: Any
    adapter: Any  # peft's model around it; None: all weights were trained
    pool: Any
    dtype: torch.dtype | None  # of the floating tensors; None: the base's
    facts: Mapping[str, Any]  # for the card: base, task, settings, ...


def write_expert(learnt: Learnt, directory: Path) -> None:
    """Write the expert, once: an adapter of a CLIP is put into the weights, and lies beside them in `adapter/`.

    Args:
        learnt: What training has left; its module may be changed.
        directory: Must not exist yet, or be empty.

    Raises:
        CheckpointError: The directory is taken, or the disk cannot hold it.
    """
    if learnt.pool.family == "clip":
        _write_clip(learnt, directory)
        return
    specs = specs_of(learnt.pool.reference)
    nbytes = sum(torch.Size(spec.shape).numel() * 4 for spec in specs.values()) if learnt.adapter is None else 0
    with partial_directory(directory, nbytes) as partial:
        if learnt.adapter is None:
            _write_language(learnt, partial)
        else:
            _save_adapter(learnt, partial)


def _write_clip(learnt: Learnt, directory: Path) -> None:
    """A whole CLIP with the trained vision tower."""
    with tempfile.TemporaryDirectory(prefix="crucible-") as scratch:
        module = learnt.module
        if learnt.adapter is not None:
            from harness.finetune_lora import merged

            _save_adapter(learnt, Path(scratch) / "adapter")
            module = merged(learnt.adapter)
        layout = replace(learnt.pool.layout({}, learnt.dtype), texts=lambda: {"README.md": card(learnt.facts)})
        weights = module.cpu().state_dict()
        tower = ((name, weights[name].to(layout.specs[name].dtype)) for name in learnt.pool.reference)
        write_directory(directory, layout, tower)
        if learnt.adapter is not None:
            shutil.copytree(Path(scratch) / "adapter", directory / "adapter")


def _write_language(learnt: Learnt, directory: Path) -> None:
    """A whole language model: weights as transformers names them, tokenizer and settings of the base."""
    layout = learnt.pool.layout({}, learnt.dtype)
    first = next(iter(specs_of(learnt.pool.reference).values())).dtype
    with quiet():
        learnt.module.cpu().to(learnt.dtype or first).save_pretrained(directory)
    for file in layout.copies:
        shutil.copyfile(file, directory / file.name)
    for name, text in layout.texts().items():
        if name != CONFIG:
            (directory / name).write_text(text, encoding="utf-8")
    (directory / "README.md").write_text(card(learnt.facts), encoding="utf-8")


def _save_adapter(learnt: Learnt, directory: Path) -> None:
    from harness.finetune_lora import save

    save(learnt.adapter, directory)
    (directory / "README.md").write_text(card(learnt.facts, "peft"), encoding="utf-8")


def card(facts: Mapping[str, Any], library: str = "transformers") -> str:
    """README.md: the hub's metadata, and how the expert was trained."""
    head = f"---\nlibrary_name: {library}\ntags:\n- crucible\n---"
    rows = [f"| {key} | {value if isinstance(value, str) else json.dumps(value)} |" for key, value in facts.items()]
    table = "\n".join(["| | |", "| --- | --- |", *rows])
    title = f"# Expert for {facts['task']}"
    return "\n\n".join([head, title, "Fine-tuned with Crucible.", table]) + "\n"
