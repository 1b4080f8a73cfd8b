"""Which experts of a mixture a method keeps: the model is fed texts, and every layer's experts are judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.calibration import opened, show, texts_of
from harness.config import PoolSettings, RunConfig, UserError
from harness.examples import Texts
from methods.expert_prune import chosen, mixed, sent
from pools.headers import CheckpointError
from pools.thinned import mixtures


def thinned(config: RunConfig, pool: PoolSettings, resolved: Callable[[str], Path]) -> dict[str, Any]:
    """What the pool is asked for: the experts kept of each layer, as `pools.thinned.thin` takes them.

    Args:
        config: Of the run.
        pool: With one model.
        resolved: Gives the directory of `models:/` and `runs:/` members.

    Raises:
        UserError: The model cannot be opened or fed, has no mixtures, or not so many experts.
    """
    try:
        found = opened(pool, resolved)
        name, tensors = next(iter(found.experts.items()))
        paths = mixtures(tensors, found.frame.config.to_dict())  # type: ignore[attr-defined]
        texts = texts_of(config, found, name, config.method.texts, "texts")
        return {"kept": kept_of(found.module(tensors), texts, list(paths), config)}
    except CheckpointError as error:
        raise UserError(str(error)) from error


@torch.no_grad()
def kept_of(module: Any, texts: Texts, paths: list[str], config: RunConfig) -> list[list[int]]:
    """The experts kept of every layer, in order of depth.

    Raises:
        CheckpointError: The module has other mixtures than the checkpoint.
        UserError: The method refuses a layer.
    """
    blocks = [part for part in module.modules() if hasattr(part, "gate") and hasattr(part, "experts")]
    if len(blocks) != len(paths):
        raise CheckpointError(f"the model has {len(blocks)} mixtures of experts, its checkpoint {len(paths)}")
    own, params, size = module.config, config.method, config.adaptation.batch_size
    top_k, divided = own.num_experts_per_tok, getattr(own, "norm_topk_prob", True)
    by_path = dict(zip(paths, blocks, strict=True))
    tokens = entering(module, by_path, texts, size)
    kept: list[list[int]] = []
    for path, block in by_path.items():
        logits, outputs = judged(block, tokens[path])
        aim = None
        if params.progressive and kept:
            aim = mixed(logits, outputs, range(logits.shape[1]), top_k, divided)
            logits, outputs = judged(block, entering(module, {path: block}, texts, size)[path])
        try:
            kept.append(chosen(logits, outputs, top_k, params, divided, aim))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        if params.progressive:
            block.gate.register_forward_hook(_only(kept[-1], top_k, divided))
    return kept


def entering(module: Any, blocks: dict[str, Any], texts: Texts, size: int) -> dict[str, torch.Tensor]:
    """What enters each block at all tokens, path -> (N, d)."""
    found: dict[str, list[torch.Tensor]] = {path: [] for path in blocks}
    show(module, blocks, texts, size, lambda path, tokens: found[path].append(tokens))
    return {path: torch.cat(parts) for path, parts in found.items()}


def _only(kept: list[int], top_k: int, divided: bool) -> Callable[..., Any]:
    """A forward hook of a router that sends tokens to some of its experts only."""

    def hook(gate: Any, given: Any, told: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (told[0], *sent(told[0], kept, top_k, divided))

    return hook


def judged(block: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's logits (N, E) and what every expert makes of every token (N, E, d); tokens (N, d)."""
    logits = tokens @ block.gate.weight.T
    one = tokens.new_ones(len(tokens), 1)
    places = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
    outputs = [block.experts(tokens, places + number, one) for number in range(logits.shape[1])]
    return logits, torch.stack(outputs, dim=1)
