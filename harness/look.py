"""Walks over the weights before a merge: for the numbers that a rule is given, over the model or one tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from harness.crew import ALONE, Crew
from harness.inputs import Inputs
from harness.job import Merge, Tick
from harness.pieces import Job, cut, own_stream, pieces
from methods.catalogue import find
from methods.kinds import Piece, Pieces, resolve
from methods.similarity import cosine_similarities


def look_ahead(job: Merge, crew: Crew, tick: Tick) -> torch.Tensor | None:
    """The numbers over the whole model that the rule is given."""
    if not job.row.prepare or is_per_tensor(job) or not any(map(job.inputs.is_weight, job.inputs.specs)):
        return None
    walk, held = functools.partial(walk_over, job, crew, tick), job.inputs.held
    prepare = resolve(job.row.prepare)
    if held is None:
        return prepare(walk, job.params)
    kept = held.made(job.row, lambda: resolve(job.row.kept)(walk))
    extras = {"kept": kept} if job.row.kept else {}
    return held.numbers(job.row, job.params, job.inputs.seed, lambda: prepare(walk, job.params, **extras), job.veneers)


def walk_over(
    job: Merge, crew: Crew, tick: Tick, function: Callable[[Piece], Any], limit: int | None = None
) -> Iterator[Any]:
    """`methods.kinds.Pieces` over the whole model."""
    names = filter(job.inputs.is_weight, job.inputs.specs)
    whole = not job.row.elementwise or bool(job.row.stats)
    tasks = list(cut(names, job.inputs, whole))

    def work(task: Job) -> list[Any]:
        with own_stream(job.inputs.device), torch.no_grad():
            return [function(job.dress(piece)[0]) for piece in pieces(job.row, job.inputs, task, limit)]

    for task, found in zip(tasks, crew.map(work, tasks), strict=True):
        tick("prepare", min(task.stop - task.start, limit or task.stop) * job.width[task.name])
        yield from found


def is_per_tensor(job: Merge) -> bool:
    """Whether the prepare pass is over each tensor on its own."""
    return bool(job.row.prepare) and (job.row.per_tensor or getattr(job.params, "scope", "model") == "tensor")


def numbers_of(job: Merge, task: Job, params: Any) -> torch.Tensor | None:
    """The numbers over one tensor that the rule is given."""

    def walk(function: Callable[[Piece], Any], limit: int | None = None) -> Iterator[Any]:
        return (function(job.dress(piece)[0]) for piece in pieces(job.row, job.inputs, task, limit))

    return resolve(job.row.prepare)(walk, params)


def task_vector_cosines(inputs: Inputs, crew: Crew = ALONE) -> torch.Tensor:
    """Cosine similarity of each pair of task vectors over all weights, (T, T) float64."""
    return cosine_similarities(task_vectors(inputs, crew))


def task_vectors(inputs: Inputs, crew: Crew = ALONE, whole: bool = False) -> Pieces:
    """A walk over all weights for what only looks at them: in chunks, or with `whole` one tensor at a time."""
    job = Merge(replace(find("task_arithmetic"), elementwise=not whole), None, inputs)
    return functools.partial(walk_over, job, crew, lambda phase, n: None)
