"""Models that are no single checkpoint (ensembles, routed mixtures) as safetensors and a JSON recipe, never a pickle.

A directory holds `model.safetensors` (all tensors of the built module), `recipe.json` (what it was built from, so that
its structure can be built again) and `base/` (a complete model of the pool's family: processor, tokenizer, text tower).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pools.checkpoint import Checkpoint
from pools.faults import Spec, specs_of
from pools.headers import CheckpointError
from pools.open import Pool, open_pool
from pools.partial import partial_directory
from pools.write import SHARD_BYTES, Shards, nbytes_of

RECIPE = "recipe.json"
_FORMAT = 1
_BASE = "base"


class Wrapped(NamedTuple):
    """A built module, and the pool that feeds it and makes its heads."""

    module: nn.Module
    pool: Pool
    recipe: dict[str, Any]


# From a recipe and a pool of the base alone to a module of the right structure; `pool.skeleton()` costs no memory.
Rebuild = Callable[[Mapping[str, Any], Pool], nn.Module]


def is_wrapped(directory: Path) -> bool:
    """Whether a directory holds a built module."""
    return (Path(directory) / RECIPE).is_file()


def save_wrapped(
    directory: Path, module: nn.Module, recipe: Mapping[str, Any], pool: Pool, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write a built module; the directory appears under its name only when it is complete.

    Args:
        directory: Must not exist yet, or be empty.
        module: What was built; its tensors are written in their own dtypes.
        recipe: JSON-compatible: all that `load_wrapped`'s `rebuild` needs (method, params, names of experts).
        pool: What the module was built from; it needs a base.
        shard_bytes: Most bytes of one weights file.

    Returns:
        The names of the files and directories.

    Raises:
        CheckpointError: The directory is taken, the disk cannot hold the model, or the pool has no base.
    """
    if pool.base is None:
        raise CheckpointError(
            "a built module is kept with the pool's base, and the pool has none; name one as pool.base"
        )
    base = pool.base
    tensors, aliases = _without_aliases(module.state_dict())
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    facts = {"format": _FORMAT, "family": pool.family, "aliases": aliases, "recipe": dict(recipe)}
    needed = sum(tensor.nbytes for tensor in tensors.values()) + sum(map(nbytes_of, specs_of(base).values()))
    with partial_directory(Path(directory), needed) as partial:
        pool.write(partial / _BASE, base.items(), {"method": "base", "note": "the base of the model one directory up"})
        with Shards(partial, specs, shard_bytes) as shards:
            for name, tensor in tensors.items():
                shards.put(name, tensor)
        (partial / RECIPE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return sorted(path.name for path in partial.iterdir())


def load_wrapped(directory: Path, rebuild: Rebuild) -> Wrapped:
    """Load a built module with the pool that feeds it.

    Args:
        directory: What `save_wrapped` wrote.
        rebuild: Builds the structure again; weights it gives are replaced.

    Raises:
        CheckpointError: The directory is not complete, or the tensors do not fit the structure.
    """
    directory = Path(directory)
    try:
        facts = json.loads((directory / RECIPE).read_text(encoding="utf-8"))
        family, aliases, recipe = facts["family"], facts["aliases"], facts["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / RECIPE} is no recipe of a built model: {error!r}") from error
    if facts.get("format") != _FORMAT:
        raise CheckpointError(f"{directory / RECIPE} has the format {facts.get('format')}, known is {_FORMAT}")
    pool = open_pool(family, str((directory / _BASE).absolute()), {})
    module = rebuild(recipe, pool)
    weights = dict(Checkpoint(directory))
    weights |= {alias: weights[name] for alias, name in aliases.items()}
    try:
        module.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]  # torch tells one fault a line, after a line of its own
        raise CheckpointError(
            f"the tensors of {directory} do not fit what its recipe builds, {recipe.get('method', 'a model')} of "
            f"{len(recipe.get('experts', ()))} experts: {(first or [str(error)])[0].strip()}"
        ) from error
    _tie(module, aliases)
    hollow = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if hollow:
        raise CheckpointError(f"{directory} has no values for {', '.join(hollow[:5])}")
    return Wrapped(module.eval(), pool, recipe)


def _tie(module: nn.Module, aliases: Mapping[str, str]) -> None:
    """Make parameters that are one tensor under several names one again, so that whatever changes one changes all."""
    for alias, name in aliases.items():
        outer, _, leaf = alias.rpartition(".")
        owner = module.get_submodule(outer)
        if leaf in owner._parameters:
            owner._parameters[leaf] = module.get_parameter(name)


def _without_aliases(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors that are the same memory under several names are kept once: tensors, and alias -> name."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        if first.setdefault(memory, name) == name:
            tensors[name] = tensor
        else:
            aliases[name] = first[memory]
    return tensors, aliases
