"""Merges block by block: the statistics of each block are collected behind those that are merged already.

One module is filled anew: up to a block with what is merged, the block itself with one expert after the other. What
lies behind it does not matter yet. So nothing is asked of an architecture but the depth of each name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from harness.inputs import MergeError, Tensors
from harness.job import Merge
from harness.merge import merge, selected
from harness.sparsity import prunes, refuse_unprunable
from methods.catalogue import find

Named = Callable[[str], bool]
Collect = Callable[[str, Named], Mapping[str, torch.Tensor]]  # (expert, which linear layers) -> statistics


def merged_by_layers(job: Merge, module: nn.Module, collect: Collect) -> Merge:
    """Merge in memory, and hand on what came out as a merge of one member that has nothing left to do.

    Args:
        job: A merge whose statistics are not known.
        module: Has the merged tensors by their names; its weights are overwritten.
        collect: The statistics of an expert's linear layers, taken from the module as it stands.

    Raises:
        MergeError: A veneer needs to look at the whole model first, the module has other tensors than its file, or the
            merge fails on a tensor.
    """
    looking = [worn.veneer.name for worn in job.veneers if worn.veneer.prepare]
    if looking:
        raise MergeError(
            f"{job.row.name} merges block by block; {', '.join(looking)} looks at the whole model first: leave it out"
        )
    job = replace(job, inputs=selected(job.row, job.params, job.inputs))
    refuse_unprunable(job.row, job.inputs, job.of)
    blocks: dict[int, list[str]] = {}
    for name in job.inputs.specs:
        blocks.setdefault(job.inputs.roles.layer_of(name), []).append(name)
    own = module.state_dict()
    lacking = [name for name in job.inputs.specs if name not in own]
    if lacking:
        raise MergeError(
            f"{job.row.name} merges block by block in a module, and this {type(module).__name__} keeps {lacking[0]} "
            f"(and {len(lacking) - 1} more) in tensors of other names; experts of mixtures are pruned by moe_pruner"
        )
    merged: dict[str, torch.Tensor] = {}
    for depth in sorted(blocks):
        done = merge(_block(job, blocks[depth], own, collect))
        _fill(own, done)
        merged |= done
    member = {name: merged[name] for name in job.inputs.specs}
    tells_dtypes = job.inputs.base if job.inputs.base is not None else next(iter(job.inputs.experts.values()))
    row = replace(find("expert"), name=job.row.name, params=job.row.params, members="", prunes=job.row.prunes)
    return Merge(row, job.params, replace(job.inputs, base=tells_dtypes, experts={"merged": member}), job.params_of)


def _block(job: Merge, names: list[str], own: Mapping[str, torch.Tensor], collect: Collect) -> Merge:
    """The merge of some tensors, read once, with each expert's statistics."""
    inputs, wanted = job.inputs, frozenset(filter(job.inputs.roles.is_linear, names))
    if job.row.prunes:
        wanted = frozenset(name for name in names if prunes(job.row, inputs, name, job.of(name)))
    experts = {expert: {name: tensors[name] for name in names} for expert, tensors in inputs.experts.items()}
    base = None if inputs.base is None else {name: inputs.base[name] for name in names}
    stats: dict[str, Tensors] = {}
    for expert, tensors in experts.items():
        if wanted:
            _fill(own, tensors)
        stats[expert] = collect(expert, wanted.__contains__) if wanted else {}
    row = replace(job.row, prunes="")  # counted once, of what comes out; and not every block has a layer to prune
    inputs = replace(inputs, base=base, experts=experts, stats=stats, dtype=torch.float32)
    return replace(job, row=row, inputs=inputs)


@torch.no_grad()
def _fill(own: Mapping[str, torch.Tensor], tensors: Tensors) -> None:
    """Overwrite a module's tensors."""
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
