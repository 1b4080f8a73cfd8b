"""A run from configuration to record: open, merge, write, evaluate, record."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn

from harness.assess import Outcome, assess
from harness.bench import Bench, open_bench
from harness.compose import flat, to_yaml
from harness.config import RunConfig, UserError
from harness.direct import params_by_name
from harness.execute import describe, launch, together
from harness.inputs import MergeError
from harness.keep import Keeper, keep, members, refuse_taken
from harness.learning_plots import learning_curve
from harness.make import Job, Made, make
from harness.rebuild import open_directory, prefer
from harness.stacking import stacked
from harness.track import DataInput, Run, local_path, open_run
from harness.veneers import asked
from methods.catalogue import find
from methods.kinds import Row
from pools.headers import CheckpointError
from tasks.splits import TaskError


def run(config: RunConfig, parent: str | None = None) -> Outcome:
    """Merge, score and record what the configuration asks for.

    Args:
        config: What to do.
        parent: Id of the run that this one is nested under.

    Raises:
        UserError: The input is bad; nothing was computed.
    """
    row = find(config.method_name)
    fabric = launch(config.fabric.accelerator, config.fabric.devices, config.fabric.precision, config.seed)
    with together(fabric), _tracked(config, row, fabric, parent) as tracked:
        with tracked.phase("open"):
            refuse_taken(config.output)
            bench = open_bench(stacked(config), config.tasks, local_path)
            record_inputs(tracked, bench, config)
        with tracked.phase("prepare"):
            made = _made(config, row, bench, fabric, tracked)
        module = keep(made, Keeper(config, bench, tracked, fabric), row.kind.value)
        tracked.lineage(members(bench.pool))
        return assess(config, bench, fabric, tracked, module, made)


def score_model(config: RunConfig) -> Outcome:
    """Score the model that `config.model` names, without merging.

    Raises:
        UserError: There is no such model, or it is not of the pool's family.
    """
    row = find(config.method_name)
    fabric = launch(config.fabric.accelerator, config.fabric.devices, config.fabric.precision, config.seed)
    with together(fabric), _tracked(config, row, fabric) as tracked:
        with tracked.phase("open"):
            bench = open_bench(config.pool, config.tasks, local_path)
            record_inputs(tracked, bench, config)
            tracked.lineage(members(bench.pool))
            module = _opened(config, bench)
        return assess(config, bench, fabric, tracked, module, None)


def _opened(config: RunConfig, bench: Bench) -> nn.Module:
    """The module of `config.model`, a directory or an MLflow URI of one; a language model brings its tokenizer."""
    place = str(config.model)
    directory = local_path(place) if place.startswith(("models:/", "runs:/")) else Path(place).expanduser()
    if not directory.is_dir():
        raise UserError(f"model={place}: there is no such directory; a path, models:/... and runs:/... are taken")
    module, own = open_directory(directory, bench.pool.family, config.pool.trust_remote_code)
    try:
        prefer(module, config.evaluation.preference)
    except ValueError as error:
        raise UserError(f"evaluation.preference={config.evaluation.preference}: {error}") from error
    if bench.pool.family != "clip":
        bench.reader = own  # its vocabulary may be another than the pool's
    return module


@contextmanager
def _tracked(config: RunConfig, row: Row, fabric: Fabric, parent: str | None = None) -> Iterator[Run]:
    """The MLflow run, on rank zero."""
    tags = {
        "method": config.method_name if config.model is None else "none",
        "pool": config.pool_name,
        "tasks": config.tasks_name,
        "kind": row.kind.value if config.model is None else "model",
        "seed": str(config.seed),
        "device": describe(fabric),
        **config.tracking.tags,
    }
    if row.is_fed(config.method) and config.adaptation.split == "test":
        tags["transductive"] = "true"
    with (
        open_run(
            config.tracking.experiment,
            config.tracking.run_name or _name(config),
            tags,
            flat(config),
            config=to_yaml(config),
            active=fabric.is_global_zero,
            parent=parent,
        ) as tracked,
        refusals(),
    ):
        yield tracked


@contextmanager
def refusals() -> Iterator[None]:
    """What pool, tasks and engine refuse is for the user to put right: the message alone reaches the terminal."""
    try:
        yield
    except (CheckpointError, TaskError, MergeError, FloatingPointError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{error.filename or 'a file'} could not be written: {error.strerror}; make room") from error


def _name(config: RunConfig) -> str:
    """The method, what differs from its defaults, the pool."""
    if config.model is not None:
        return f"evaluate {config.model}"
    default = type(config.method)()
    values = vars(config.method) | config.schedules
    changed = {name: value for name, value in values.items() if value != getattr(default, name)}
    words = [
        "+".join([config.method_name, *config.veneers]),
        *(f"{name}={value}" for name, value in changed.items()),
        "on",
        config.pool_name,
    ]
    return " ".join(words) + (f" seed {config.seed}" if find(config.method_name).random else "")


def record_inputs(tracked: Run, bench: Bench, config: RunConfig) -> None:
    """Data sets as the run's inputs."""
    split = config.evaluation.split
    tracked.inputs(
        DataInput(name, task.source, task.fingerprint(split), split, len(task.rows(split)), task.labels, task.columns)
        for name, task in bench.tasks.items()
    )


def _made(config: RunConfig, row: Row, bench: Bench, fabric: Fabric, tracked: Run) -> Made:
    """The merge, its loss and coefficients recorded step by step."""
    names = list(bench.pool.experts)

    def stepped(step: int, loss: float, coefficients: torch.Tensor | None) -> None:
        tracked.metric("adaptation/loss", loss, step)
        if coefficients is not None:
            courses.append(coefficients.mean(0).tolist())
            for name, value in zip(names, courses[-1], strict=True):
                tracked.metric(f"coefficient/{name}", value, step)
        losses.append(loss)

    losses: list[float] = []
    courses: list[list[float]] = []
    dtype = getattr(torch, config.engine.dtype) if config.engine.dtype else None
    own = params_by_name(config, bench.pool)
    made = make(
        Job(row, config.method, bench, fabric, config.adaptation, config.seed, stepped, dtype, own, asked(config))
    )
    if losses and config.evaluation.plots and fabric.is_global_zero:
        unit = "loss in nats" if getattr(config.method, "loss", row.loss) in ("entropy", "labels") else "loss"
        drawn = learning_curve(losses, config.method_name, unit, courses, names, row.whole)
        tracked.figure(drawn, "plots/adaptation_loss.png")
    if made.coefficients is not None:
        rows = [
            {"group": group, **dict(zip(names, values.tolist(), strict=True))}
            for group, values in made.coefficients.items()
        ]
        tracked.table(rows, "coefficients.json")
    return made
