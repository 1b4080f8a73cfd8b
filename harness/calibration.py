"""What a language model is fed before it is opened for a merge: texts that the user gives, or its own task's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.adapt import fed_texts
from harness.bench import opened_with
from harness.config import PoolSettings, RunConfig, UserError
from harness.examples import Texts, choose
from pools.headers import CheckpointError
from pools.open import Pool, open_pool
from tasks.open import open_task
from tasks.splits import TaskError


def opened(pool: PoolSettings, resolved: Callable[[str], Path]) -> Pool:
    """The pool as it is configured, before a method has changed it.

    Raises:
        CheckpointError: All that keeps its models from being opened, a line each.
    """
    found = open_pool(**vars(pool), resolve=resolved)
    faults = found.faults()
    if faults:
        raise CheckpointError("\n".join(faults))
    return found


def texts_of(config: RunConfig, pool: Pool, expert: str, given: Sequence[str], key: str) -> Texts:
    """Texts that are given, or without them the inputs of the expert's own task, as `adaptation` says.

    Args:
        config: Of the run.
        pool: Feeds them.
        expert: Whose task it is.
        given: By the user.
        key: Of the configuration, where the user gives some.

    Raises:
        UserError: None are given, and no task is called so, or it is of pictures, has no such split or no rows.
    """
    if given:
        return Texts("perplexity", list(given), pool, range(len(given)))
    settings = config.tasks.tasks.get(expert)
    known = ", ".join(config.tasks.tasks) or "none"
    if settings is None or settings.kind == "image_classification":
        raise UserError(
            f"{config.method_name} is fed texts: give some as method.{key}, or choose tasks of texts, one of which is "
            f"called {expert}, for its inputs; tasks are {known}"
        )
    asked = config.adaptation
    try:
        task: Any = open_task(expert, root=config.tasks.root, **opened_with(settings))
        rows = task.rows(asked.split)
    except TaskError as error:
        raise UserError(str(error)) from error
    indices = choose(len(rows), asked.examples, config.seed)
    return Texts(task.kind, rows, pool, indices, task.labels, block=task.block)


def batches(texts: Texts, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The model's inputs, `size` rows at a time.

    Raises:
        UserError: There is no token in any of them.
    """
    n_read = 0
    for start in range(0, len(texts), size):
        inputs = fed_texts(texts, range(start, min(start + size, len(texts))))
        if inputs:
            n_read += int(inputs["attention_mask"].sum())
            yield inputs
    if not n_read:
        raise UserError("the texts that a method is fed have no token")


def show(
    module: nn.Module, parts: Mapping[str, nn.Module], texts: Texts, size: int, see: Callable[[str, torch.Tensor], None]
) -> None:
    """Run a model on texts; `see` is told a part's name and what enters it at all tokens but padding, (N, width)."""
    read = torch.ones(())

    def watch(name: str) -> Callable[..., None]:
        return lambda part, given: see(name, given[0][read])

    hooks = [part.register_forward_pre_hook(watch(name)) for name, part in parts.items()]
    try:
        for inputs in batches(texts, size):
            read = inputs["attention_mask"].bool()
            module(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
