"""Merges expert after expert: the state, the base and one expert are in memory."""

from __future__ import annotations

import math
import time

import torch

from harness.apply import index_of, rounded
from harness.inputs import MergeError, Tensors
from harness.job import Done, Merge, Sink, Tick
from methods.kinds import Base, Piece
from methods.primitives import average


def buffer_of(name: str, job: Merge) -> torch.Tensor:
    """Integer buffers are the base's; floating ones (running statistics) the mean over the experts."""
    inputs, dtype = job.inputs, job.specs[name].dtype
    experts = [expert[name] for expert in inputs.experts.values()]
    if (index := index_of(job)) is not None:
        return experts[index].to(dtype, copy=True)
    if experts and dtype.is_floating_point:
        return average(torch.stack([expert.float() for expert in experts])).to(dtype)
    if inputs.base is not None:
        return inputs.base[name].to(dtype, copy=True)
    if any(not torch.equal(expert, experts[0]) for expert in experts):
        raise MergeError(
            f"{name} is an integer buffer that differs between experts, and there is no base to take it from"
        )
    return experts[0].to(dtype, copy=True)


def folded(sink: Sink, job: Merge, tick: Tick) -> Done:
    """Merge expert after expert; the state, the base and one expert are in memory."""
    inputs = job.inputs
    names = [name for name in inputs.specs if inputs.is_weight(name)]

    def weights(whose: str, tensors: Tensors) -> dict[str, torch.Tensor]:
        loaded = {name: tensors[name].to(inputs.device, torch.float32) for name in names}
        tick("merge", sum(tensor.nbytes for tensor in loaded.values()))
        for name, tensor in loaded.items():
            if not torch.isfinite(tensor).all():
                raise MergeError(f"{name} has NaN or infinite weights in {whose}; a merge would spread them")
        return loaded

    started = time.perf_counter()
    base = inputs.base if job.row.base is not Base.unused else None
    fold = job.row.load()(weights("the base", base) if base is not None else {}, job.params, inputs.roles)
    for expert, tensors in inputs.experts.items():
        fold.update(weights(f"expert {expert}", tensors))
    merged = fold.result()
    done = []
    for name in sink.in_order():
        if name not in job.specs:
            continue
        spec = job.specs[name]
        if name in merged:
            flat = merged[name].reshape(-1)
            part, error, square = rounded(flat, job, Piece(name, None, flat[None]), spec)
        else:
            part, error, square = buffer_of(name, job).reshape(-1), 0.0, 0.0
        sink.put_part(name, 0, part)
        done.append(Done(0, part.nbytes, error, square))
    read = sum(math.prod(spec.shape) * job.width[name] for name, spec in job.specs.items())
    return Done(
        read,
        sum(part.bytes_written for part in done),
        math.fsum(part.error for part in done),
        math.fsum(part.square for part in done),
        seconds={"prepare": 0.0, "merge": time.perf_counter() - started},
    )
