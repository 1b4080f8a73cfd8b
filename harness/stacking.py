"""What a method that stacks layers, or models side by side, asks of the pool, from the method's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from harness.config import PoolSettings, RunConfig, UserError
from harness.inputs import MergeError
from methods.catalogue import find
from methods.kinds import Row, resolve
from pools.headers import CheckpointError

BASE = "model"  # what the base is called where it is the one model


def stacked(config: RunConfig) -> PoolSettings:
    """The pool as it is opened: with slices or a mixture where the method asks for it, else as it was configured.

    Raises:
        UserError: The pool has slices of its own, or neither an expert nor a base.
    """
    row, pool = find(config.method_name), config.pool
    if not row.ranges and not row.mixture:
        return pool
    if row.ranges and pool.slices is not None:
        raise UserError(f"{row.name} stacks the layers itself; leave pool.slices out, or choose method=passthrough")
    if not pool.experts and pool.base is None:
        raise UserError(f"{row.name} stacks the layers of one expert or of the base, and the pool has neither")
    if not pool.experts:
        pool = replace(pool, base=None, experts={BASE: str(pool.base)})
    if row.mixture:
        from harness.direct import tracked_place
        from harness.upscale import mixed

        return mixed(config, row, pool, tracked_place)
    return replace(pool, slices=_slices(row, config.method, next(iter(pool.experts))))


def restacked(row: Row, params: Any, experts: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The one expert's tensors in memory, stacked as the method says.

    Raises:
        MergeError: There is not one expert, or it has no such layers.
    """
    from pools.views import restack

    if len(experts) != 1:
        raise MergeError(f"{row.name} stacks the layers of 1 expert, got {len(experts)}: {', '.join(experts)}")
    try:
        found = restack(None, experts, _slices(row, params, next(iter(experts)))).experts
    except CheckpointError as error:
        raise MergeError(str(error)) from error
    return {name: {key: tensors[key] for key in tensors} for name, tensors in found.items()}


def _slices(row: Row, params: Any, expert: str) -> list[dict[str, Any]]:
    """The pool's slices: a range of the expert's layers each."""
    return [{"experts": {expert: span}} for span in resolve(row.ranges)(params)]
