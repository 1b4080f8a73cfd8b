"""What a run works on: the pool and the tasks, opened once, with examples and heads kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.config import (
    KINDS,
    AdaptationSettings,
    EvaluationSettings,
    PoolSettings,
    TaskSettings,
    TasksSettings,
    UserError,
)
from harness.examples import Examples, Texts, choose
from harness.lm_eval import BACKENDS, Asked
from pools.headers import CheckpointError
from pools.open import Pool, open_pool
from tasks.language import LanguageTask
from tasks.open import Task, open_task
from tasks.splits import TaskError

HEADED = ("text_classification", "preference")  # kinds whose models have a head of their own


class Bench:
    """Pool and tasks with everything that is made from them at most once."""

    def __init__(self, pool: Pool, tasks: Mapping[str, Task], asked: Asked | None = None) -> None:
        self.pool, self.tasks, self.asked = pool, dict(tasks), asked
        self.reader = pool  # feeds the model that is scored: a language model that was merged before has its own
        self._heads: dict[str, torch.Tensor] = {}
        self._examples: dict[tuple[str, str, int | None, int, bool], Examples | Texts] = {}

    def head(self, task: str) -> torch.Tensor:
        """What turns the module's outputs into a task's logits, (K, D)."""
        if task not in self._heads:
            self._heads[task] = self.pool.head(self.tasks[task].labels, self.tasks[task].templates)
        return self._heads[task]

    def examples(
        self, task: str, split: str, limit: int | None = None, seed: int = 0, reader: Pool | None = None
    ) -> Examples | Texts:
        """A task's split, or a seeded choice of `limit` of its rows, fed by the pool or another `reader`."""
        reader = reader or self.pool
        key = (task, split, limit, seed, reader is self.pool)
        if key not in self._examples:
            rows = self.tasks[task].rows(split)
            self._examples[key] = self._made(task, rows, choose(len(rows), limit, seed), reader)
        return self._examples[key]

    def _made(self, task: str, rows: Any, indices: Sequence[int], reader: Pool) -> Examples | Texts:
        own = self.tasks[task]
        if not isinstance(own, LanguageTask):
            return Examples(rows, reader, self.head(task), indices)
        return Texts(
            own.kind, rows, reader, indices, own.labels, self.head_of(task), own.max_new_tokens, own.stop, own.block,
            heads=self.pool,
        )  # fmt: skip

    def head_of(self, task: str) -> str | None:
        """The expert whose head tells a text_classification task's classes; None: the base."""
        return task if task in self.pool.experts else None

    def head_fingerprint(self, task: str) -> str | None:
        """Content hash of the head that is no part of a merge; None where there is no such head."""
        heads = getattr(self.pool, "heads", {}) if self.tasks[task].kind in HEADED else {}
        return heads[self.head_of(task)].fingerprint if heads else None

    def evaluation(
        self, settings: EvaluationSettings, seed: int, reader: Pool | None = None
    ) -> dict[str, Examples | Texts]:
        """What a model is scored on, fed by the pool or another `reader`."""
        return {task: self.examples(task, settings.split, settings.limit, seed, reader) for task in self.tasks}

    def adaptation(
        self, settings: AdaptationSettings, seed: int, tasks: Iterable[str], texts: bool = False
    ) -> dict[str, Any]:
        """What methods that look at data are fed, `Examples` or, where they take texts, `Texts`.

        Raises:
            UserError: As `feeds`, or a task has no rows.
        """
        names = self.feeds(tasks, texts)
        found = {task: self.examples(task, settings.split, settings.examples, seed) for task in names}
        empty = [task for task, examples in found.items() if not len(examples)]
        if empty:
            raise UserError(f"the {settings.split} split of {', '.join(empty)} has no rows to learn from")
        return dict(found)

    def feeds(self, tasks: Iterable[str], texts: bool = False) -> list[str]:
        """The tasks, all of which can feed methods that look at data.

        Raises:
            UserError: Some have no images with classes, which is all that methods are fed that take no texts.
        """
        names = list(tasks)
        if texts:
            return names
        unfit = [f"{name} ({self.tasks[name].kind})" for name in names if self.tasks[name].kind != Examples.kind]
        if unfit:
            raise UserError(
                f"methods that learn from data are fed tasks of kind {Examples.kind} only, not {', '.join(unfit)}; "
                "choose a method without data (`crucible list methods`)"
            )
        return names


def open_bench(pool: PoolSettings, tasks: TasksSettings, resolve: Callable[[str], Path]) -> Bench:
    """Open pool and tasks and make the heads; all that headers and schemas can tell is checked, no expert is read.

    Raises:
        UserError: All that is wrong, a line each.
    """
    faults = unfit_kinds(pool.family, tasks)
    opened: Pool | None = None
    try:
        opened = open_pool(**vars(pool), resolve=resolve)
        faults += opened.faults()
    except CheckpointError as error:
        faults.append(str(error))
    found = {}
    for name, task in tasks.tasks.items():
        try:
            found[name] = open_task(name, root=tasks.root, **opened_with(task))
        except TaskError as error:
            faults.append(str(error))
    asked = None
    if tasks.lm_eval.tasks and not faults:
        asked = Asked(tasks.lm_eval)
    if opened is None or faults:
        raise UserError("\n".join(faults))
    return _with_heads(Bench(opened, found, asked))


def _headless(bench: Bench) -> list[str]:
    """Tasks that classify texts, and neither expert nor base has a head for them."""
    heads = getattr(bench.pool, "heads", {})
    return [
        f"task {name}: no expert is called so, and the base has no head of a classifier; give an expert of that name"
        for name, task in bench.tasks.items()
        if task.kind in HEADED and bench.head_of(name) not in heads
    ]


def opened_with(task: TaskSettings) -> dict[str, Any]:
    """What a task of its kind is opened with."""
    images, texts = (
        {"image", "templates"},
        {"text", "prompt", "target", "chosen", "rejected", "max_new_tokens", "stop", "block"},
    )
    other = texts | {"kind"} if task.kind == "image_classification" else images
    given = {field.name: getattr(task, field.name) for field in dataclasses.fields(task) if field.name not in other}
    return {"kind": task.kind, **given}


def unfit_kinds(family: str, tasks: TasksSettings) -> list[str]:
    """What models of a family cannot be scored on."""
    fit = KINDS[family]
    able = f"it is scored on {' and '.join(fit)}" if fit else "it is merged only: tasks=none"
    faults = [
        f"task {name} is of kind {task.kind}, which a pool of family {family} cannot be scored on; {able}"
        for name, task in tasks.tasks.items()
        if task.kind not in fit
    ]
    faults += [
        f"task {name} is also a task of tasks.lm_eval: their metrics would be mixed; rename it"
        for name in tasks.tasks
        if name in tasks.lm_eval.tasks
    ]
    if family == "seq2seq":
        faults += [
            f"task {name}: a pool of family seq2seq answers prompts; set text=null and name its prompt and target"
            for name, task in tasks.tasks.items()
            if task.kind == "perplexity" and task.text is not None
        ]
    if tasks.lm_eval.tasks and family not in BACKENDS:
        faults.append(f"lm_eval scores models of family causal_lm and seq2seq, the pool's is {family}; {able}")
    return faults


def _with_heads(bench: Bench) -> Bench:
    """The same bench, the heads made.

    Raises:
        UserError: The pool has no head for some tasks (their prompts are too long for it, say).
    """
    faults = _headless(bench)
    for task in (name for name, task in bench.tasks.items() if task.kind == "image_classification"):
        try:
            bench.head(task)
        except CheckpointError as error:
            faults.append(f"task {task}: {error}")
    if faults:
        raise UserError("\n".join(faults))
    return bench
