"""Compressed experts on the disk: a complete base, what was packed beside it, and how to restore from both.

A directory holds `base/` (a complete model of the pool's family), `packed/` (safetensors, `<tensor>/<part>`) and
`compressed.json` (method, parameters, experts in their order, seed). Heads of classifiers, which belong to their tasks
and are never merged, stand in `heads/`, by the expert's place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.compress import Packed, Restored
from methods.catalogue import find
from pools.checkpoint import Checkpoint
from pools.faults import specs_of
from pools.headers import CheckpointError
from pools.open import open_pool
from pools.partial import partial_directory
from pools.write import SHARD_BYTES, Shards, nbytes_of

if TYPE_CHECKING:
    from pools.open import Pool

FACTS = "compressed.json"
_FORMAT = 1
_BASE, _PACKED, _HEADS = "base", "packed", "heads"


def is_compressed(directory: Path) -> bool:
    """Whether a directory holds compressed experts."""
    return (Path(directory) / FACTS).is_file()


def save_packed(
    directory: Path, packed: Packed, pool: Pool, lineage: Mapping[str, Any], shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write base and packed experts; the directory appears under its name only when it is complete.

    Args:
        directory: Must not exist yet, or be empty.
        packed: What was packed.
        pool: What the experts are of.
        lineage: How this was made, for the card of the base.
        shard_bytes: Most bytes of one weights file.

    Returns:
        The names of the files and directories.

    Raises:
        CheckpointError: The directory is taken, or the disk cannot hold what is written.
    """
    assert pool.base is not None, "a compression needs a base"
    facts = {
        "format": _FORMAT,
        "family": pool.family,
        "method": packed.row.name,
        "params": asdict(packed.params),
        "experts": list(packed.experts),
        "seed": packed.seed,
        "dtype": None if packed.dtype is None else str(packed.dtype).removeprefix("torch."),
        "n_parameters": packed.n_parameters,
        "expert_bytes": packed.expert_bytes,
    }
    heads = getattr(pool, "heads", {})
    needed = packed.nbytes + sum(map(nbytes_of, specs_of(pool.base).values()))
    with partial_directory(Path(directory), needed) as partial:
        note = "the base of the compressed experts one directory up"
        pool.write(partial / _BASE, pool.base.items(), {**lineage, "method": "base", "note": note})
        _write(partial / _PACKED, packed.tensors, shard_bytes)
        for index, expert in enumerate(packed.experts):
            if expert in heads:
                _write(partial / _HEADS / str(index), heads[expert], shard_bytes)
        (partial / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return sorted(path.name for path in partial.iterdir())


def _write(directory: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> None:
    directory.mkdir(parents=True)
    with Shards(directory, specs_of(tensors), shard_bytes) as shards:
        for name, tensor in tensors.items():
            shards.put(name, tensor)


def open_packed(directory: Path, trust_remote_code: bool = False) -> tuple[Restored, Pool]:
    """What `save_packed` wrote: a module that becomes any of the experts, and the pool that feeds it.

    Args:
        directory: Where it was written.
        trust_remote_code: Code among the files of a language model may run.

    Raises:
        CheckpointError: The directory is not complete, or was written by another version.
    """
    directory = Path(directory).absolute()
    try:
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        if facts["format"] != _FORMAT:
            raise CheckpointError(f"{directory / FACTS} has the format {facts['format']}, known is {_FORMAT}")
        row = find(facts["method"])
        dtype = None if facts["dtype"] is None else getattr(torch, facts["dtype"])
        params = row.load_params()(**facts["params"])
        experts, family = tuple(facts["experts"]), facts["family"]
        sizes = int(facts["n_parameters"]), int(facts["expert_bytes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{directory / FACTS} does not tell of compressed experts: {error!r}") from error
    pool = open_pool(family, str(directory / _BASE), {}, trust_remote_code=trust_remote_code)
    for index, expert in enumerate(experts):
        if (directory / _HEADS / str(index)).is_dir():
            pool.heads[expert] = Checkpoint(directory / _HEADS / str(index))  # type: ignore[attr-defined]
    packed = Packed(row, params, experts, Checkpoint(directory / _PACKED), *sizes, facts["seed"], dtype)
    return Restored(packed, pool), pool
