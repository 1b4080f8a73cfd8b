"""Cuts what is merged into pieces and reads them into buffers that are used again and again.

An element-wise rule is given chunks of a fixed size, whatever the tensor, so that memory is a few chunks for each
worker; other rules are given one tensor at a time.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from harness.inputs import Inputs, Tensors
from methods.draws import drawer
from methods.kinds import Base, Piece, Row
from pools.reading import read_into

CHUNK = 1 << 18  # elements of an element-wise rule's piece: a core's cache holds it; the block that pools hash

_KEPT = CHUNK * 64  # most numbers of a buffer that is kept

_kept = threading.local()


class Job(NamedTuple):
    """What a worker does at a time: elements [start, stop) of a flattened tensor."""

    name: str
    start: int
    stop: int


def cut(names: Iterable[str], inputs: Inputs, whole: bool) -> Iterator[Job]:
    """Jobs for some tensors, in order: chunks, or whole tensors; what is no weight is read whole in any case."""
    for name in names:
        size = math.prod(inputs.specs[name].shape)
        step = max(size, 1) if whole or not inputs.is_weight(name) else CHUNK
        for start in range(0, max(size, 1), step):
            yield Job(name, start, min(start + step, size))


def pieces(row: Row, inputs: Inputs, job: Job, limit: int | None = None) -> Iterator[Piece]:
    """The pieces of a job in float32 on the device, each valid until the next is taken.

    Args:
        row: The method; element-wise rules get flat chunks.
        inputs: What is merged.
        job: Which part of which tensor.
        limit: Only the first elements of each chunk, for a look at the numbers; a multiple of 8.
    """
    stats = inputs.stats_of(job.name) if row.stats else None
    shape = inputs.specs[job.name].shape
    if not row.elementwise:
        yield _piece(row, inputs, job, shape, stats)
        return
    flat = None if stats is None else stats.flatten(1) if stats.dim() > 1 else stats[:, None]
    for start in range(job.start, job.stop, CHUNK):
        stop = min(start + min(CHUNK, limit or CHUNK), job.stop)
        own = None if flat is None else flat[:, start:stop]
        yield _piece(row, inputs, Job(job.name, start, stop), (stop - start,), own)


def _piece(row: Row, inputs: Inputs, job: Job, shape: tuple[int, ...], stats: torch.Tensor | None) -> Piece:
    """Read one piece."""
    if inputs.held is not None and inputs.held.holds(tuple(inputs.experts), job.name):
        return _held(row, inputs, job, shape, stats)
    n = job.stop - job.start
    experts = _buffer("experts", len(inputs.experts) * n, inputs.device).view(len(inputs.experts), n)
    for row_of, tensors in zip(experts, inputs.experts.values(), strict=True):
        _read(tensors, job, row_of)
    base = None
    if inputs.base is not None and row.base is not Base.unused:
        base = _buffer("base", n, inputs.device)
        _read(inputs.base, job, base)
        base = base.to(inputs.device, non_blocking=True).reshape(shape)
    stacked = experts.to(inputs.device, non_blocking=True).reshape(len(inputs.experts), *shape)
    draw = None
    if row.random:
        draw = drawer(inputs.seed, job.name, tuple(inputs.experts), shape, job.start, inputs.device)
    return Piece(job.name, base, stacked, draw, stats, inputs.place(job.name))


def _held(row: Row, inputs: Inputs, job: Job, shape: tuple[int, ...], stats: torch.Tensor | None) -> Piece:
    """One piece of what is in memory already: nothing is copied, and rules change nothing that they are given."""
    held = inputs.held
    base = None
    if inputs.base is not None and row.base is not Base.unused:
        base = held.base[job.name][job.start : job.stop].reshape(shape)
    stacked = held.stacked[job.name][:, job.start : job.stop].reshape(len(inputs.experts), *shape)
    draw = held.draw(inputs.seed, job.name, shape, job.start) if row.random else None
    return Piece(job.name, base, stacked, draw, stats, inputs.place(job.name))


def _read(tensors: Tensors, job: Job, out: torch.Tensor) -> None:
    read_into(tensors, job.name, job.start, out)


def _buffer(purpose: str, n: int, device: torch.device) -> torch.Tensor:
    """Memory of this worker for n float32 numbers, pinned where it is copied to a GPU; only what is small is kept."""
    pinned = device.type == "cuda"
    if n > _KEPT:
        return torch.empty(n, dtype=torch.float32, pin_memory=pinned)
    held: dict[tuple[str, bool], torch.Tensor] = _kept.__dict__.setdefault("buffers", {})
    if (purpose, pinned) not in held or len(held[purpose, pinned]) < n:
        held[purpose, pinned] = torch.empty(n, dtype=torch.float32, pin_memory=pinned)
    return held[purpose, pinned][:n]


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Let this worker's copies and kernels run on a stream of its own, done when the body is."""
    if device.type != "cuda":
        yield
        return
    streams: dict[torch.device, torch.cuda.Stream] = _kept.__dict__.setdefault("streams", {})
    stream = streams.setdefault(device, torch.cuda.Stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
