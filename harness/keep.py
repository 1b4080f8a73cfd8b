"""Keeps what a merge made: writes it once, with where it comes from, and gives back the module to score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from harness.bench import Bench
from harness.config import RunConfig, UserError
from harness.make import Made
from harness.rebuild import recipe
from harness.track import Run
from methods.kinds import Row
from pools.open import Pool
from pools.wrapped import save_wrapped


def keep(made: Made, config: RunConfig, row: Row, bench: Bench, tracked: Run, leads: bool) -> nn.Module:
    """Write the merged model into the run and to `config.output`, as far as either is asked for.

    Args:
        made: Tensors, or a module.
        config: Says where to.
        row: The method.
        bench: Pool and tasks.
        tracked: The run.
        leads: Whether this process is the one that writes.

    Returns:
        The merged module.
    """
    story = {"method": row.name, "params": dataclasses.asdict(config.method), "seed": config.seed, "run_id": tracked.id}
    write: Callable[[Path], Any]
    if made.module is not None:
        built = made.module.cpu()
        facts = recipe(row.name, config.method, list(bench.pool.experts))

        def write(path: Path) -> Any:
            return save_wrapped(path, built, facts, bench.pool)

        module: nn.Module = built
    else:
        assert made.tensors is not None
        merged = made.tensors

        def write(path: Path) -> Any:
            return bench.pool.write(path, merged.items(), story)

        module = bench.pool.module(merged)
    if leads and config.output is not None:
        write(Path(config.output))
    if leads and config.tracking.log_model:
        tracked.log_model(write, {"tasks": known_tasks(bench), "kind": row.kind.value})
    return module


def refuse_taken(output: str | None) -> None:
    """Say before work starts what the writer would say after it.

    Raises:
        UserError: `output` is there already, and not empty.
    """
    place = Path(output) if output is not None else None
    if place is not None and place.exists() and (place.is_file() or any(place.iterdir())):
        raise UserError(f"output={output}: it exists already and is not overwritten; name another directory")


def known_tasks(bench: Bench) -> dict[str, dict[str, list[str]]]:
    """Labels and templates by task, kept with the model so that it can be asked by a task's name."""
    return {
        name: {"labels": list(task.labels), "templates": list(task.templates)} for name, task in bench.tasks.items()
    }


def members(pool: Pool) -> dict[str, dict[str, Any]]:
    """Where base and experts come from, and their content."""
    found = {"base": pool.base} if pool.base is not None else {}
    return {
        name: {"source": member.source, "fingerprint": member.fingerprint, "bytes": member.nbytes}
        for name, member in {**found, **pool.experts}.items()
    }
