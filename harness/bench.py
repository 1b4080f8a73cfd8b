"""What a run works on: the pool and the tasks, opened once, with examples and heads kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from harness.config import AdaptationSettings, EvaluationSettings, PoolSettings, TasksSettings, UserError
from harness.examples import Examples, choose
from pools.headers import CheckpointError
from pools.open import Pool, open_pool
from tasks.image_classification import Task, TaskError, open_task


class Bench:
    """Pool and tasks with everything that is made from them at most once."""

    def __init__(self, pool: Pool, tasks: Mapping[str, Task]) -> None:
        self.pool, self.tasks = pool, dict(tasks)
        self._heads: dict[str, torch.Tensor] = {}
        self._examples: dict[tuple[str, str, int | None, int], Examples] = {}

    def head(self, task: str) -> torch.Tensor:
        """What turns the module's outputs into a task's logits, (K, D)."""
        if task not in self._heads:
            self._heads[task] = self.pool.head(self.tasks[task].labels, self.tasks[task].templates)
        return self._heads[task]

    def examples(self, task: str, split: str, limit: int | None = None, seed: int = 0) -> Examples:
        """A task's split, or a seeded choice of `limit` of its rows."""
        key = (task, split, limit, seed)
        if key not in self._examples:
            rows = self.tasks[task].rows(split)
            self._examples[key] = Examples(rows, self.pool, self.head(task), choose(len(rows), limit, seed))
        return self._examples[key]

    def evaluation(self, settings: EvaluationSettings, seed: int) -> dict[str, Examples]:
        """What a merged model is scored on."""
        return {task: self.examples(task, settings.split, settings.limit, seed) for task in self.tasks}

    def adaptation(self, settings: AdaptationSettings, seed: int, tasks: Iterable[str]) -> dict[str, Examples]:
        """What methods that look at data are fed."""
        return {task: self.examples(task, settings.split, settings.examples, seed) for task in tasks}


def open_bench(pool: PoolSettings, tasks: TasksSettings, resolve: Callable[[str], Path]) -> Bench:
    """Open pool and tasks and make the heads; all that headers and schemas can tell is checked, no expert is read.

    Raises:
        UserError: All that is wrong, a line each.
    """
    faults: list[str] = []
    opened: Pool | None = None
    try:
        opened = open_pool(family=pool.family, base=pool.base, experts=pool.experts, root=pool.root, resolve=resolve)
        faults += opened.faults()
    except CheckpointError as error:
        faults.append(str(error))
    found = {}
    for name, task in tasks.tasks.items():
        try:
            found[name] = open_task(
                name=name,
                path=task.path,
                splits=task.splits,
                labels=task.labels,
                templates=task.templates,
                image=task.image,
                label=task.label,
                version=task.version,
                subset=task.subset,
                root=tasks.root,
            )
        except TaskError as error:
            faults.append(str(error))
    if opened is None or faults:
        raise UserError("\n".join(faults))
    return _with_heads(Bench(opened, found))


def _with_heads(bench: Bench) -> Bench:
    """The same bench, the heads made.

    Raises:
        UserError: The pool has no head for some tasks (their prompts are too long for it, say).
    """
    faults = []
    for task in bench.tasks:
        try:
            bench.head(task)
        except CheckpointError as error:
            faults.append(f"task {task}: {error}")
    if faults:
        raise UserError("\n".join(faults))
    return bench
