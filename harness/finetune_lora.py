"""LoRA adapters on a module, plain and linearised: the gate to peft, whose layout they are saved in.

A linearised adapter (L-LoRA: Tang et al. 2023, arXiv:2310.04742) is the first-order expansion of each adapted layer's
scale * B A x around the initial A0 and B0. As B0 is zero that is scale * B A0 x exactly: A stays as it was drawn and B
is learnt, so that adapters are linear in what was learnt and merge without cross terms. It is saved as any other.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from harness.config import UserError, closest
from harness.finetune_settings import LoraSettings
from pools.roles import ModuleRoles

TASK_TYPES = {"causal_lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "sequence_classification": "SEQ_CLS"}


def adapted(
    module: nn.Module, settings: LoraSettings, family: str, base: str, whole: Sequence[str], linear: bool, seed: int
) -> PeftModel:
    """Put an untrained adapter on a module, in place; what is trained then requires a gradient, nothing else.

    Args:
        module: What the pool made.
        settings: Rank, scale, targets.
        family: The pool's.
        base: What the adapter is told its base is: a hub id or a path.
        whole: Modules that are trained and saved whole: a classifier's head.
        linear: Only B is trained.
        seed: Of A.

    Raises:
        UserError: The module has no such layers.
    """
    targets, transposed = _targets(module, settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.numerator,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets,
        modules_to_save=list(whole) or None,
        bias="none",
        fan_in_fan_out=transposed,
        task_type=TASK_TYPES.get(family),
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft 0.21 on transformers 5
        wrapped = get_peft_model(module, config)
    wrapped.peft_config["default"].base_model_name_or_path = base
    if linear:
        for name, parameter in wrapped.named_parameters():
            if ".lora_A." in name or ".lora_embedding_A." in name:
                parameter.requires_grad_(False)
    return wrapped


def save(wrapped: PeftModel, directory: Path) -> None:
    """Write an adapter in peft's layout, without its empty model card."""
    wrapped.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # peft writes a set, in any order
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def merged(wrapped: PeftModel) -> Any:
    """The module with the adapter in its weights."""
    return wrapped.merge_and_unload()


def _targets(module: nn.Module, wanted: Sequence[str]) -> tuple[list[str], bool]:
    """Linear layers of the blocks, those of the wanted last names, as short as can be; whether stored as (in, out)."""
    roles = ModuleRoles(module)
    inside = [
        name.removesuffix(".weight")
        for name in module.state_dict()
        if (roles.is_linear(name) or roles.is_transposed(name)) and 1 <= roles.layer_of(name) <= roles.n_layers
    ]
    if not inside:
        raise UserError(f"finetune.mode=lora: a {type(module).__name__} has no linear layers in blocks; use mode=full")
    leaves = dict.fromkeys(_leaf(path) for path in inside)
    for name in wanted:
        if name not in leaves:
            raise UserError(f"finetune.lora.targets: no linear layer is called {name!r}; {closest(name, leaves)}")
    chosen = {path for path in inside if not wanted or _leaf(path) in wanted}
    transposed = any(roles.is_transposed(f"{path}.weight") for path in chosen)
    return sorted(_short(chosen, [path for path, _ in module.named_modules()])), transposed


def _short(chosen: set[str], paths: Iterable[str]) -> set[str]:
    """Last names where all modules of that name are meant, whole paths elsewhere."""
    others = {_leaf(path) for path in paths if path not in chosen}
    return {path if _leaf(path) in others or _leaf(path).isdigit() else _leaf(path) for path in chosen}


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
