"""Models that were written, as modules again: checkpoints of a pool's family, what a build made, compressed experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.catalogue import find

if TYPE_CHECKING:
    from torch import nn

    from pools.open import Pool
    from pools.parts import ModuleParts


def recipe(method: str, params: Any, experts: list[str], names: Sequence[str] = ()) -> dict[str, Any]:
    """What `rebuild` needs to know of a built module; `names` are the module's parameters that it merged."""
    return {"method": method, "params": asdict(params), "experts": experts, "names": list(names)}


def parts_of(pool: Any, module: nn.Module, names: Iterable[str], experts: list[str]) -> ModuleParts:
    """What builds ask of a pool's module."""
    from pools.parts import ModuleParts

    return ModuleParts(module, names, pool.family, experts)


def rebuild(recipe: Mapping[str, Any], pool: Pool) -> nn.Module:
    """The structure of a build, from skeletons without weights.

    Args:
        recipe: `method`, its `params` as a dict, and the names of the `experts` and of what was merged.
        pool: A pool with the base.
    """
    row = find(recipe["method"])
    params = row.load_params()(**recipe["params"])
    base = pool.skeleton()
    parts = parts_of(pool, base, recipe["names"], recipe["experts"])
    module = row.load()(base, [pool.skeleton() for _ in recipe["experts"]], params, parts)
    module.merged_names = recipe["names"]
    if getattr(module, "lesson", None) is not None:
        module.lesson.finish(module)
    return module


def prefer(module: Any, numbers: Sequence[float] | None) -> None:
    """Have a model that trades tasks for each other make another trade-off, until it is asked for another.

    Args:
        module: Any.
        numbers: The preference, one for each expert; None: the model's own.

    Raises:
        ValueError: The model makes no trade-off, or the numbers do not fit its experts.
    """
    own = getattr(module, "preference", None)
    if own is not None:
        own.ask(numbers)
    elif numbers is not None:
        raise ValueError("a preference is for models that trade tasks for each other (pwe_moe), and this one does not")


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
    from pools.lora_config import is_adapter
    from pools.open import open_pool
    from pools.wrapped import is_wrapped, load_wrapped

    if is_compressed(directory):
        return open_packed(directory, trust_remote_code)
    if is_wrapped(directory):
        wrapped = load_wrapped(directory, rebuild)
        return wrapped.module, wrapped.pool
    if is_adapter(directory):
        return _adapted(directory, family, trust_remote_code)
    pool = open_pool(family, str(directory.absolute()), {}, trust_remote_code=trust_remote_code)
    return pool.module(), pool


def _adapted(directory: Path, family: str, trust_remote_code: bool) -> tuple[nn.Module, Pool]:
    """The module of a LoRA adapter on the base that its configuration names."""
    from pools.lora_config import read_config
    from pools.open import open_pool

    base, name = str(read_config(directory).get("base_model_name_or_path")), "adapter"
    pool: Any = open_pool(family, base, {name: str(directory.absolute())}, trust_remote_code=trust_remote_code)
    module = pool.module(pool.experts[name])
    return (pool.with_head(module, name) if name in getattr(pool, "heads", {}) else module), pool
