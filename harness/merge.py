"""The engine: applies a method to base and experts, piece by piece, in bounded memory, by any number of workers.

It asks the catalogue row what the method needs and never for its name. Arithmetic runs in float32; what comes out has
the base's dtype, or a chosen one. Integer buffers come from the base, floating buffers are averaged over the experts.
The same bits come out for any number of workers and processes on one kind of device.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields, replace
from typing import Any

import torch

from harness.apply import call, rehearse, rounded
from harness.crew import ALONE, Crew
from harness.folding import buffer_of, folded
from harness.inputs import Inputs, MergeError, Tensors, check
from harness.job import Done, Memory, Merge, Sink, Tick
from harness.look import is_per_tensor, look_ahead, numbers_of, walk_over
from harness.pieces import Job, cut, own_stream, pieces
from harness.sparsity import UNCOUNTED, count_zeros, prunes, refuse_unprunable, total
from harness.stacking import restacked
from harness.veneers import Worn, dresser, faults, veneered
from methods.catalogue import VENEERS, find
from methods.kinds import Kind, Roles, Row, Veneer, resolve
from pools.faults import specs_of
from pools.headers import CheckpointError
from pools.roles import NamedRoles


def merge_state_dicts(
    base: Tensors | None,
    experts: Mapping[str, Tensors],
    method: str,
    params: Mapping[str, Any] | None = None,
    stats: Mapping[str, Tensors] | None = None,
    seed: int = 0,
    roles: Roles | None = None,
    veneers: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, torch.Tensor]:
    """Merge state dicts in memory: the same engine, checks and errors as a run.

    Args:
        base: The base's tensors by name, or None for methods that do without.
        experts: Name -> tensors by name; the order counts where the method says so.
        method: A name of the catalogue, of the kinds rule, informed, fold or compression.
        params: Parameters by name; what is left out has its default. A compression restores the one `expert` named.
        stats: For informed rules, expert -> tensor name (or its module's) -> Fisher diagonal (*shape) or
            Gram matrix (in, in).
        seed: Of random methods; masks depend on it, the tensor's name and the expert's name alone.
        roles: What names mean; by default read off the names.
        veneers: What goes around the rule, name -> parameters by name, the first innermost.

    Returns:
        The merged tensors, with the base's (or the first expert's) names, shapes and dtypes.

    Raises:
        KeyError: No method has that name.
        TypeError: A parameter is unknown.
        ValueError: A parameter, the number of experts or a tensor is refused; the message names it.

    >>> one = {"w": torch.tensor([1.0, 2.0])}
    >>> merge_state_dicts(None, {"a": one, "b": {"w": torch.tensor([3.0, 4.0])}}, "simple_average")
    {'w': tensor([2., 3.])}
    """
    row = find(method)
    made = _make_params(row, params or {})
    if row.learns and made.steps:
        raise MergeError(f"{row.name} with steps={made.steps} is fed data: run `crucible run method={row.name}`")
    around = _veneers(row, veneers or {})
    if row.ranges:
        base, experts = None, restacked(row, made, experts)
    if row.mixture:
        raise MergeError(f"{row.name} changes configuration and names besides: `crucible merge method={row.name}`")
    if roles is None:
        roles = NamedRoles(specs_of(base if base is not None else next(iter(experts.values()), {})))
    return merge(Merge(row, made, Inputs(base, experts, roles, stats, seed), veneers=around))


def merge(job: Merge, crew: Crew = ALONE, tick: Tick = lambda phase, n: None) -> dict[str, torch.Tensor]:
    """Merge in memory; all checks that need no weights come before any is read."""
    job = ready(job)
    sink = Memory(job.specs)
    merge_into(sink, job, crew, tick)
    return sink.tensors


def ready(job: Merge) -> Merge:
    """The same merge, checked, with only the experts that the method reads.

    Raises:
        MergeError: All that is wrong, a line each; no weight was read.
    """
    row = veneered(job.row, job.veneers)
    job = replace(job, row=row, inputs=selected(row, job.params, job.inputs))
    check(job.row, job.inputs)
    refuse_unprunable(job.row, job.inputs, job.of)
    if job.row.kind is not Kind.fold:
        rehearse(job)
    return job


@torch.no_grad()
def merge_into(
    sink: Sink,
    job: Merge,
    crew: Crew = ALONE,
    tick: Tick = lambda phase, n: None,
    share: tuple[int, int] = (0, 1),
) -> Done:
    """Merge what the sink wants.

    Args:
        sink: Takes the merged parts.
        job: What `ready` has passed.
        crew: Workers.
        tick: Told of the bytes that were read, by phase.
        share: This process's rank and how many there are: each merges its part of the bytes.

    Raises:
        MergeError: Weights are NaN or infinite, or the rule fails on a tensor.
    """
    started = time.perf_counter()
    if job.row.kind is Kind.compression and job.params.expert is None:
        named = ", ".join(job.inputs.experts)
        raise MergeError(f"{job.row.name} makes no single model: expert=NAME says which is restored; there are {named}")
    if job.row.kind is Kind.fold:
        return folded(sink, job, tick) if share[0] == 0 else Done()
    job = replace(job, dress=dresser(job.veneers, functools.partial(walk_over, job, crew, tick)))
    numbers = look_ahead(job, crew, tick)
    prepared = time.perf_counter()
    whole = not job.row.elementwise or bool(job.row.stats) or is_per_tensor(job)
    wanted = [name for name in sink.in_order() if name in job.specs]
    tasks = _own(list(cut(wanted, job.inputs, whole)), *share)
    parts = []
    with closing(crew.map(functools.partial(_work, job, numbers, sink), tasks)) as results:
        for task, part in zip(tasks, results, strict=True):
            parts.append(part)
            tick("merge", (task.stop - task.start) * job.width[task.name])
    return Done(
        sum(part.bytes_read for part in parts),
        sum(part.bytes_written for part in parts),
        math.fsum(part.error for part in parts),
        math.fsum(part.square for part in parts),
        total(part.zeros for part in parts),
        {"prepare": prepared - started, "merge": time.perf_counter() - prepared},
    )


def _veneers(row: Row, given: Mapping[str, Mapping[str, Any]]) -> tuple[Worn, ...]:
    """Veneers from names and keywords."""
    wrong = faults(row, list(given))
    if wrong:
        raise ValueError("\n".join(wrong))
    return tuple(Worn(VENEERS[name], _make_params(VENEERS[name], own)) for name, own in given.items())


def _make_params(row: Row | Veneer, given: Mapping[str, Any]) -> Any:
    """The params dataclass from keywords; unknown ones are named with those that are known."""
    cls = row.load_params()
    known = [field.name for field in fields(cls)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{row.name} has no parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    return cls(**given)


def selected(row: Row, params: Any, inputs: Inputs) -> Inputs:
    """Only the experts that the method reads, in their order; statistics in the same order."""
    names = tuple(inputs.experts)
    if row.members:
        try:
            names = resolve(row.members)(params, names)
        except ValueError as error:
            raise MergeError(str(error)) from error
    stats = inputs.stats
    if stats is not None and set(stats) == set(inputs.experts):
        stats = {name: stats[name] for name in names}
    return replace(inputs, experts={name: inputs.experts[name] for name in names}, stats=stats)


def _own(tasks: list[Job], rank: int, n: int) -> list[Job]:
    """A rank's share of the tasks: a run of them with its part of the elements."""
    if n == 1:
        return tasks
    total = sum(task.stop - task.start for task in tasks)
    own, before = [], 0
    for task in tasks:
        if min(before * n // max(total, 1), n - 1) == rank:
            own.append(task)
        before += task.stop - task.start
    return own


def _work(job: Merge, numbers: torch.Tensor | None, sink: Sink, task: Job) -> Done:
    """Merge one job's elements and put them where they belong."""
    name, spec = task.name, job.specs[task.name]
    read = (task.stop - task.start) * job.width[name]
    if not job.inputs.is_weight(name):
        flat = buffer_of(name, job).reshape(-1)[task.start : task.stop]
        sink.put_part(name, task.start, flat)
        return Done(read, flat.nbytes)
    try:
        with own_stream(job.inputs.device), torch.no_grad():
            params = job.of(name)
            pruned = bool(job.row.prunes) and prunes(job.row, job.inputs, name, params)
            if is_per_tensor(job):
                numbers = numbers_of(job, task, params)
            start, found = task.start, []
            for piece in pieces(job.row, job.inputs, task):
                seen, finish = job.dress(piece)
                result = finish(call(job, params, seen, numbers)).reshape(-1)
                part, error, square = rounded(result, job, piece, spec)
                sink.put_part(name, start, part)
                start += len(part)
                zeros = count_zeros(part, pruned) if job.row.prunes else UNCOUNTED
                found.append(Done(0, part.nbytes, error, square, zeros))
    except (RuntimeError, ValueError) as error:
        if isinstance(error, MergeError | CheckpointError):
            raise
        raise MergeError(f"{job.row.name} failed on {name} {spec.shape}: {error}") from error
    return Done(
        read,
        sum(part.bytes_written for part in found),
        math.fsum(part.error for part in found),
        math.fsum(part.square for part in found),
        total(part.zeros for part in found),
    )
