"""What a method that makes one mixture of experts of the pool's models asks of the pool, from its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.calibration import batches, opened, show, texts_of
from harness.config import PoolSettings, RunConfig, UserError
from harness.examples import Texts
from methods.kinds import Row, resolve
from pools.headers import CheckpointError

FAMILY = "causal_lm"


def mixed(config: RunConfig, row: Row, pool: PoolSettings, resolved: Callable[[str], Path]) -> PoolSettings:
    """The pool as it is opened: with the mixture that the method asks for.

    Args:
        config: Of the run.
        row: A method with a mixture.
        pool: With an expert at least.
        resolved: Gives the directory of `models:/` and `runs:/` members.

    Raises:
        UserError: The pool's models do not continue texts, it has a mixture of its own, or the method's parameters do
            not go with its experts.
    """
    if pool.family != FAMILY:
        raise UserError(
            f"{row.name} puts feed-forward blocks of language models of the family {FAMILY} side by side; the pool's "
            f"are of the family {pool.family}"
        )
    if pool.mixture is not None:
        raise UserError(f"{row.name} makes the mixture itself; leave pool.mixture out, or choose method=passthrough")
    try:
        wanted = resolve(row.mixture)(config.method, list(pool.experts), config.seed)
    except ValueError as error:
        raise UserError(f"method: {error}") from error
    if "keep" in wanted:
        from harness.thinning import thinned

        return replace(pool, mixture=thinned(config, pool, resolved))
    if getattr(config.method, "router", "random") != "random":
        wanted["routers"] = routers(config, pool, resolved)
    return replace(pool, mixture=wanted)


def routers(config: RunConfig, pool: PoolSettings, resolved: Callable[[str], Path]) -> dict[str, torch.Tensor]:
    """Routers by what tells the experts' texts apart, in the base as it is, or without one the first expert.

    Returns:
        Path of a feed-forward block -> (T, width), the experts in the pool's order.

    Raises:
        UserError: The models cannot be opened or fed.
    """
    asked = config.method
    try:
        found = opened(pool, resolved)
        module: Any = found.module(found.base if found.base is not None else next(iter(found.experts.values())))
        paths, size = found.roles.mlps(), config.adaptation.batch_size
        texts = [texts_of(config, found, name, asked.prompts.get(name, ()), "prompts") for name in pool.experts]
        if asked.router == "embed":
            embedding = module.get_input_embeddings()
            own = contrasted(torch.stack([mean_embedding(embedding, each, size) for each in texts]))
            return dict.fromkeys(paths, own)
        parts = {path: module.get_submodule(path) for path in paths}
        means = [mean_inputs(module, parts, each, size) for each in texts]
    except CheckpointError as error:
        raise UserError(str(error)) from error
    return {path: contrasted(torch.stack([mean[path] for mean in means])) for path in paths}


def contrasted(means: torch.Tensor) -> torch.Tensor:
    """(T, width) -> the same less the mean over T, of length one; what all have in common sends a token nowhere."""
    return nn.functional.normalize(means - means.mean(0), dim=1)


@torch.no_grad()
def mean_inputs(module: nn.Module, parts: Mapping[str, nn.Module], texts: Texts, size: int) -> dict[str, torch.Tensor]:
    """The mean over all tokens of what enters each part: name -> (width,) float32."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, tokens: torch.Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + tokens.double().sum(0)
        counts[name] = counts.get(name, 0) + len(tokens)

    show(module, parts, texts, size, see)
    return {name: (total / counts[name]).float() for name, total in sums.items()}


@torch.no_grad()
def mean_embedding(embedding: nn.Module, texts: Texts, size: int) -> torch.Tensor:
    """The mean over all tokens of their embeddings, (width,) float32."""
    parts = [embedding(inputs["input_ids"])[inputs["attention_mask"].bool()] for inputs in batches(texts, size)]
    return torch.cat(parts).double().mean(0).float()
