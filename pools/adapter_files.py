"""Writes an adapter as peft reads it: factors of each module, whole tensors of others, configuration and card.

Every module's lora_alpha is its rank, so that its scaling is exactly 1 and the factors hold all there is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pools.headers import CheckpointError
from pools.locate import is_hub_id
from pools.lora import EMBEDDING, PREFIX, TRANSPOSED
from pools.lora_config import CONFIG, WEIGHTS, scaling_of
from pools.partial import partial_directory


@dataclass(frozen=True)
class Module:
    """What is written for one module: its change is left @ right, as its weight stands on the disk, flattened."""

    path: str
    left: torch.Tensor  # (m, r)
    right: torch.Tensor  # (r, n)
    kind: str  # of `pools.lora`
    shape: tuple[int, ...]  # of the weight

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.right.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """A and B under peft's names, float32."""
        flipped = self.kind in (TRANSPOSED, EMBEDDING)
        a, b = (self.left.t(), self.right.t()) if flipped else (self.right, self.left)
        if self.kind == EMBEDDING:
            keys = (f"{PREFIX}{self.path}.lora_embedding_A", f"{PREFIX}{self.path}.lora_embedding_B")
        else:
            keys = (f"{PREFIX}{self.path}.lora_A.weight", f"{PREFIX}{self.path}.lora_B.weight")
        kernel = self.shape[2:]
        a, b = a.reshape(-1, *self.shape[1:]) if kernel else a, b.reshape(*b.shape, *[1] * len(kernel))
        return {key: tensor.detach().float().contiguous() for key, tensor in zip(keys, (a, b), strict=True)}


def write_adapter(
    directory: Path,
    modules: Iterable[Module],
    whole: Mapping[str, torch.Tensor],
    names: Iterable[str],
    *,
    base: str,
    task_type: str | None,
    lineage: Mapping[str, Any],
) -> list[str]:
    """Write an adapter's directory; it gets its name when all of it is on the disk.

    Args:
        directory: Must not exist yet, or be empty.
        modules: Those that are changed by factors.
        whole: Tensors that take the base's place, by name: all of a module's (`modules_to_save`), or the bias of one of
            `modules`.
        names: All modules of the base, so that short names can be told from ambiguous ones.
        base: What peft is told the base is: a hub id or a path.
        task_type: As peft has it, such as CAUSAL_LM.
        lineage: For the card: `method`, `params`, `members` (name -> (source, fingerprint)), and what else is known.

    Returns:
        The files' names.

    Raises:
        CheckpointError: The directory is taken, or no module is changed by factors, so that peft would make no adapter.
    """
    from safetensors.torch import save_file

    modules = list(modules)
    if not modules:
        raise CheckpointError(f"{directory}: none of the base's matrices is changed, so there is no adapter to write")
    config = adapter_config(modules, whole, set(names), base, task_type)
    tensors = {_key(name, modules): tensor.detach().contiguous() for name, tensor in whole.items()}
    for module in modules:
        tensors |= module.tensors()
    with partial_directory(directory, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_card(base, task_type, lineage), encoding="utf-8")
        return sorted(file.name for file in partial.iterdir())


def _key(name: str, modules: Iterable[Module]) -> str:
    """Of a whole tensor: of a module that has factors too, peft knows it as the wrapped layer's."""
    path, _, leaf = name.rpartition(".")
    wrapped = any(module.path == path for module in modules)
    return f"{PREFIX}{path}.base_layer.{leaf}" if wrapped else f"{PREFIX}{name}"


def adapter_config(
    modules: list[Module], whole: Mapping[str, torch.Tensor], names: Collection[str], base: str, task_type: str | None
) -> dict[str, Any]:
    """`adapter_config.json`: ranks that differ stand in `rank_pattern`, by whole paths, and in `alpha_pattern`."""
    ranks = {module.path: module.rank for module in modules}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    paths = sorted(ranks, key=lambda path: (-len(path), path))  # a path that ends in another comes before it
    patterns = {path: ranks[path] for path in paths} if len(set(ranks.values())) > 1 else {}
    saved = sorted({name.rpartition(".")[0] for name in whole} - set(ranks))
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "target_modules": _targets(ranks, names),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(module.kind == TRANSPOSED for module in modules),
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "lora_bias": False,
        "bias": "lora_only" if any(name.rpartition(".")[0] in ranks for name in whole) else "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    for path in saved:  # peft takes all modules whose name ends so, within a word too
        others = sorted(name for name in names if name.endswith(path) and name not in saved)
        if others:
            raise CheckpointError(
                f"{path} cannot be saved whole: peft would take {others[0]} for it, by the end of its name"
            )
    for path in ranks:
        if scaling_of(config, path) != (ranks[path], 1.0):
            raise CheckpointError(
                f"{path} cannot be told from other modules by its name, as peft's rank_pattern has to"
            )
    return config


def _targets(paths: Iterable[str], names: Iterable[str]) -> list[str]:
    """Modules as `target_modules` lists them: by the last part of the name where all modules that have it are meant."""
    wanted = set(paths)
    everywhere: dict[str, set[str]] = {}
    for path in {*names, *wanted}:
        everywhere.setdefault(path.rpartition(".")[2], set()).add(path)
    found = {
        leaf if not leaf.isdigit() and everywhere[leaf] <= wanted else path
        for path in wanted
        for leaf in [path.rpartition(".")[2]]
    }
    return sorted(found)


def _card(base: str, task_type: str | None, lineage: Mapping[str, Any]) -> str:
    """README.md: the hub's metadata, the members with their fingerprints, and the lineage."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="peft",
        tags=["lora", "merge", "crucible"],
        base_model=base if is_hub_id(base) else None,
        base_model_relation="adapter" if is_hub_id(base) else None,
        pipeline_tag="text-generation" if task_type == "CAUSAL_LM" else None,
    )
    method, members = lineage.get("method", "a merge"), lineage.get("members") or {}
    rest = {key: value for key, value in lineage.items() if key not in ("method", "params", "members")}
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# Adapter made by {method}",
        f"A LoRA adapter of `{base}`, made with Crucible.",
    ]
    rows = [f"| {name} | {source} | {mark[:16]} |" for name, (source, mark) in members.items()]
    if rows:
        lines += [
            "## Members",
            "\n".join(["| member | source | fingerprint (SHA-256, first 16) |", "| --- | --- | --- |", *rows]),
        ]
    for title, facts in (("Parameters", lineage.get("params") or {}), ("Lineage", rest)):
        if facts:
            lines += [
                f"## {title}",
                "\n".join(f"- {key}: `{json.dumps(value, default=str)}`" for key, value in facts.items()),
            ]
    return "\n\n".join(lines) + "\n"
