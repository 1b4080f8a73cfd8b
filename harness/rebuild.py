"""Models that were written, as modules again: checkpoints of a pool's family, what a build made, compressed experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.catalogue import find

if TYPE_CHECKING:
    from torch import nn

    from pools.open import Pool


def recipe(method: str, params: Any, experts: list[str]) -> dict[str, Any]:
    """What `rebuild` needs to know of a built module."""
    return {"method": method, "params": asdict(params), "experts": experts}


def rebuild(recipe: Mapping[str, Any], pool: Pool) -> nn.Module:
    """The structure of a build, from skeletons without weights.

    Args:
        recipe: `method`, its `params` as a dict, and the names of the `experts`.
        pool: A pool with the base.
    """
    row = find(recipe["method"])
    params = row.load_params()(**recipe["params"])
    return row.load()(pool.skeleton(), [pool.skeleton() for _ in recipe["experts"]], params, pool.roles)


def open_directory(directory: Path, family: str = "clip", trust_remote_code: bool = False) -> tuple[nn.Module, Pool]:
    """The module of a model directory, merged, built or compressed, and the pool that feeds it and makes its heads.

    Args:
        directory: What a run has written, or a checkpoint.
        family: The pool's; what was built or compressed knows its own.
        trust_remote_code: Code among the files of a language model may run.

    Raises:
        CheckpointError: The directory holds no complete model of the family.
    """
    from harness.packed import is_compressed, open_packed
    from pools.open import open_pool
    from pools.wrapped import is_wrapped, load_wrapped

    if is_compressed(directory):
        return open_packed(directory, trust_remote_code)
    if is_wrapped(directory):
        wrapped = load_wrapped(directory, rebuild)
        return wrapped.module, wrapped.pool
    pool = open_pool(family, str(directory.absolute()), {}, trust_remote_code=trust_remote_code)
    return pool.module(), pool
