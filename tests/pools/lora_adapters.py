"""Random adapters, written by peft or by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


def loaded(directory: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def trained(base: nn.Module, place: Path, seed: int = 0, **config: Any) -> dict[str, torch.Tensor]:
    """Save a random adapter as peft does; give back what peft merges it to."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name or "modules_to_save" in name or name.endswith("bias"):
                    parameter.add_(0.3 * noise)
                else:
                    parameter.copy_(0.4 * noise)
    model.save_pretrained(place)
    return model.eval().merge_and_unload().state_dict()


def write_adapter_by_hand(place: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    place.mkdir(exist_ok=True)
    save_file(tensors, place / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "task_type": "CAUSAL_LM"} | config
    (place / "adapter_config.json").write_text(json.dumps(told))
