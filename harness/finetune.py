"""`crucible finetune`: train an expert of a pool's base on one task, and keep it as an MLflow run and model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from lightning.fabric import Fabric

from harness.bench import Bench, open_bench, opened_with
from harness.compose import flat, to_yaml
from harness.config import LmEvalSettings, RunConfig, UserError, closest
from harness.execute import describe, launch, together
from harness.finetune_session import Finished, Session, leaves, train_and_keep
from harness.finetune_settings import FinetuneSettings
from harness.keep import refuse_taken
from harness.run import refusals
from harness.track import Run, local_path, open_run
from pools.locate import is_hub_id, locate
from tasks.open import open_task

BASE = "base"


def finetune(config: RunConfig, settings: FinetuneSettings) -> Finished:
    """Train an expert.

    Args:
        config: Pool (its base is trained), tasks, seed, device, tracking; `evaluation` says what is scored.
        settings: The training.

    Raises:
        UserError: The input is bad, or the loss is no number; nothing was written.
    """
    name = _task_name(config, settings)
    _refuse(config, settings, name)
    fabric = launch(config.fabric.accelerator, config.fabric.devices, config.fabric.precision, config.seed)
    with (
        together(fabric),
        _tracked(config, settings, name, fabric) as tracked,
        tempfile.TemporaryDirectory(prefix="crucible-") as scratch,
    ):
        with tracked.phase("open"):
            refuse_taken(config.output)
            bench, base_name = _opened(config, settings, name, Path(scratch))
        return train_and_keep(Session(config, settings, name, fabric, tracked, bench, base_name))


def _task_name(config: RunConfig, settings: FinetuneSettings) -> str:
    """The task that is learnt.

    Raises:
        UserError: There is no such task, or several and none is named.
    """
    known = list(config.tasks.tasks)
    if settings.task is None and len(known) == 1:
        return known[0]
    if settings.task is None:
        raise UserError(f"finetune.task=NAME says what is learnt; {closest('', known)}")
    if settings.task not in known:
        raise UserError(
            f"finetune.task={settings.task}: the tasks {config.tasks_name} have none of that name; "
            f"{closest(settings.task, known)}"
        )
    return settings.task


def _refuse(config: RunConfig, settings: FinetuneSettings, name: str) -> None:
    """Say before anything is opened what cannot be done.

    Raises:
        UserError: All of it, a line each.
    """
    faults = []
    own = config.tasks.tasks[name]
    for key, split in (("finetune.split", settings.split), ("evaluation.split", config.evaluation.split)):
        if split not in own.splits:
            faults.append(f"{key}={split}: task {name} has no such split; it has {', '.join(own.splits)}")
    if config.pool.base is None:
        faults.append(f"an expert is trained from a base, and the pool {config.pool_name} has none; pool.base=PATH")
    if config.pool.family == "state_dict":
        faults.append("a pool of family state_dict has no modules to train; name the family of the models")
    if isinstance(config.fabric.devices, int) and config.fabric.devices > settings.batch_size:
        faults.append(
            f"fabric.devices={config.fabric.devices}: finetune.batch_size={settings.batch_size} is fewer; raise it"
        )
    if config.pool.slices is not None:
        faults.append("pool.slices stacks layers of experts; write that model with `crucible merge` and train it then")
    if settings.max_tokens is not None and config.pool.family == "clip":
        faults.append(f"finetune.max_tokens={settings.max_tokens}: images have no tokens; leave it out")
    if faults:
        raise UserError("\n".join(faults))


@contextmanager
def _tracked(config: RunConfig, settings: FinetuneSettings, name: str, fabric: Fabric) -> Iterator[Run]:
    """The MLflow run."""
    tags = {
        "kind": "expert",
        "method": "finetune",
        "mode": settings.mode,
        "task": name,
        "pool": config.pool_name,
        "tasks": config.tasks_name,
        "seed": str(config.seed),
        "device": describe(fabric),
        **config.tracking.tags,
    }
    title = config.tracking.run_name or f"finetune {settings.mode} {name} on {config.pool_name}"
    params = flat(config) | {f"finetune.{key}": value for key, value in leaves(asdict(settings))} | {"task": name}
    with (
        open_run(
            config.tracking.experiment, title, tags, params, config=to_yaml(config), active=fabric.is_global_zero
        ) as tracked,
        refusals(),
    ):
        yield tracked


def _opened(config: RunConfig, settings: FinetuneSettings, name: str, scratch: Path) -> tuple[Bench, str]:
    """The base and the task alone, and what an adapter calls the base.

    Raises:
        UserError: All that is wrong, a line each; the task has too few rows.
    """
    own = config.tasks.tasks[name]
    tasks = replace(config.tasks, tasks={name: own}, lm_eval=LmEvalSettings())
    pool = replace(config.pool, experts={}, rest=BASE)
    called = str(pool.base)
    place = locate(called, pool.root, local_path, pool.trust_remote_code).absolute()
    named = called if is_hub_id(called) and pool.root is None and not Path(called).exists() else str(place)
    if pool.family == "sequence_classification":
        from pools.new_head import n_classes, with_new_head

        labels = open_task(name, root=tasks.root, **opened_with(own)).labels
        wanted = len(labels) or 1
        if n_classes(place, called) != wanted:
            with_new_head(place, scratch / BASE, wanted, config.seed, pool.trust_remote_code)
            pool = replace(pool, base=str(scratch / BASE), root=None)
    bench = open_bench(pool, tasks, local_path)
    n = len(bench.tasks[name].rows(settings.split))
    if n < settings.batch_size:
        raise UserError(
            f"task {name} has {n} rows in {settings.split}, fewer than finetune.batch_size={settings.batch_size}; "
            "give more rows or a smaller batch"
        )
    return bench, named
