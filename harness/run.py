"""A run from configuration to record: open, merge, write, evaluate, record."""

from __future__ import annotations

import dataclasses
import errno
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from tqdm import tqdm

from harness import plots, report
from harness.bench import Bench, open_bench
from harness.compose import flat, to_yaml
from harness.config import RunConfig, UserError
from harness.evaluate import TaskScore, evaluate
from harness.execute import describe, launch, together
from harness.inputs import Inputs, MergeError
from harness.keep import keep, members, refuse_taken
from harness.make import Job, Made, make
from harness.merge import task_vector_cosines
from harness.rebuild import open_directory
from harness.references import References, references
from harness.track import DataInput, Run, local_path, open_run
from methods.catalogue import find
from methods.kinds import Row
from pools.headers import CheckpointError
from tasks.image_classification import TaskError


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    run_id: str | None  # None on every rank but zero
    scores: tuple[TaskScore, ...]
    references: References
    metrics: Mapping[str, float]
    model_uri: str | None = None  # of the logged model


def run(config: RunConfig) -> Outcome:
    """Merge, score and record what the configuration asks for.

    Raises:
        UserError: The input is bad; nothing was computed.
    """
    row = find(config.method_name)
    fabric = launch(config.fabric.accelerator, config.fabric.devices, config.fabric.precision, config.seed)
    with together(fabric), _tracked(config, row, fabric) as tracked:
        with tracked.phase("open"):
            refuse_taken(config.output)
            bench = open_bench(config.pool, config.tasks, local_path)
            _record_inputs(tracked, bench, config)
        with tracked.phase("merge"):
            made = _made(config, row, bench, fabric, tracked)
        with tracked.phase("write"):
            module = keep(made, config, row, bench, tracked, fabric.is_global_zero)
        return _evaluated(config, bench, fabric, tracked, module, made)


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
            _record_inputs(tracked, bench, config)
            module = _opened(config, bench)
        return _evaluated(config, bench, fabric, tracked, module, None)


def _opened(config: RunConfig, bench: Bench) -> nn.Module:
    """The module of `config.model`: a directory, or an MLflow URI of one."""
    place = str(config.model)
    directory = local_path(place) if place.startswith(("models:/", "runs:/")) else Path(place).expanduser()
    if not directory.is_dir():
        raise UserError(f"model={place}: there is no such directory; a path, models:/... and runs:/... are taken")
    return open_directory(directory, bench.pool.family)[0]


@contextmanager
def _tracked(config: RunConfig, row: Row, fabric: Fabric) -> Iterator[Run]:
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
    if (row.data or row.stats) and config.adaptation.split == "test":
        tags["transductive"] = "true"
    with (
        open_run(
            config.tracking.experiment,
            config.tracking.run_name or _name(config),
            tags,
            flat(config),
            config=to_yaml(config),
            active=fabric.is_global_zero,
        ) as tracked,
        _refusals(),
    ):
        yield tracked


@contextmanager
def _refusals() -> Iterator[None]:
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
    changed = {
        field.name: getattr(config.method, field.name)
        for field in dataclasses.fields(config.method)
        if getattr(config.method, field.name) != getattr(default, field.name)
    }
    words = [config.method_name, *(f"{name}={value}" for name, value in changed.items()), "on", config.pool_name]
    return " ".join(words) + (f" seed {config.seed}" if find(config.method_name).random else "")


def _record_inputs(tracked: Run, bench: Bench, config: RunConfig) -> None:
    """Data sets and members as the run's inputs."""
    split = config.evaluation.split
    tracked.inputs(
        DataInput(name, task.source, task.fingerprint(split), split, len(task.rows(split)), task.labels)
        for name, task in bench.tasks.items()
    )
    tracked.lineage(members(bench.pool))


def _made(config: RunConfig, row: Row, bench: Bench, fabric: Fabric, tracked: Run) -> Made:
    """The merge, its loss and coefficients recorded step by step."""
    names = list(bench.pool.experts)

    def stepped(step: int, loss: float, coefficients: torch.Tensor | None) -> None:
        tracked.metric("adaptation/loss", loss, step)
        if coefficients is not None:
            for name, value in zip(names, coefficients.mean(0).tolist(), strict=True):
                tracked.metric(f"coefficient/{name}", value, step)
        losses.append(loss)

    losses: list[float] = []
    made = make(Job(row, config.method, bench, fabric, config.adaptation, config.seed, stepped))
    if losses and config.evaluation.plots and fabric.is_global_zero:
        tracked.figure(plots.learning_curve(losses), "plots/adaptation_loss.png")
    if made.coefficients is not None:
        rows = [
            {"group": group, **dict(zip(names, values.tolist(), strict=True))}
            for group, values in made.coefficients.items()
        ]
        tracked.table(rows, "coefficients.json")
    return made


def _evaluated(
    config: RunConfig, bench: Bench, fabric: Fabric, tracked: Run, module: nn.Module, made: Made | None
) -> Outcome:
    """Score the module, compare it with base and experts, record it all."""
    tasks = bench.evaluation(config.evaluation, config.seed)
    rows = sum(map(len, tasks.values()))
    scores: list[TaskScore] = []
    with tracked.phase("evaluate"), _bar(fabric, rows, "evaluating") as bar:
        for found in evaluate(fabric, module, tasks, config.evaluation.batch_size, bar.update):
            tracked.metric(f"{found.task}/accuracy", found.accuracy)
            tracked.metric(f"{found.task}/loss", found.loss)
            scores.append(found)
    known = References()
    if config.evaluation.references:
        with tracked.phase("references"), _bar(fabric, None, "scoring base and experts", delay_s=0.5) as bar:
            known = references(fabric, bench, config.evaluation, config.seed, bar.update)
    metrics = summarise(scores, known)
    for key, value in metrics.items():
        tracked.metric(key, value)
    if fabric.is_global_zero:
        _record(config, bench, tracked, scores, known, metrics, made)
    return Outcome(tracked.id, tuple(scores), known, metrics, tracked.model.uri if tracked.model else None)


def summarise(scores: list[TaskScore], known: References) -> dict[str, float]:
    """Means over tasks, the worst task, and each score over its own expert's, as fusion papers report."""
    accuracies = [score.accuracy for score in scores]
    metrics = {
        "average/accuracy": math.fsum(accuracies) / len(scores),
        "average/loss": math.fsum(score.loss for score in scores) / len(scores),
        "worst/accuracy": min(accuracies),
    }
    shares = [score.accuracy / known.experts[score.task] for score in scores if known.experts.get(score.task)]
    if len(shares) == len(scores):
        metrics["average/normalized"] = math.fsum(shares) / len(shares)
    return metrics


def _record(
    config: RunConfig,
    bench: Bench,
    tracked: Run,
    scores: list[TaskScore],
    known: References,
    metrics: Mapping[str, float],
    made: Made | None,
) -> None:
    """Table, plots, description."""
    results = report.results(scores, known.experts, known.base)
    tracked.table(results, "results.json")
    tracked.describe(
        report.description(
            method=config.method_name if config.model is None else str(config.model),
            pool=config.pool_name,
            results=results,
            metrics=metrics,
            run_id=str(tracked.id),
            model_uri=tracked.model.uri if tracked.model else None,
        )
    )
    if config.evaluation.plots:
        with tracked.phase("plots"):
            _plot(bench, tracked, results, made)


def _plot(bench: Bench, tracked: Run, results: list[dict[str, Any]], made: Made | None) -> None:
    tracked.figure(plots.bars(results), "plots/accuracy.png")
    tracked.figure(plots.radar(results), "plots/radar.png")
    if made is not None and made.coefficients is not None:
        names = list(bench.pool.experts)
        tracked.figure(plots.coefficients(made.coefficients, names), "plots/coefficients.png")
    if bench.pool.base is not None and len(bench.pool.experts) > 1:
        cosines = task_vector_cosines(Inputs(bench.pool.base, bench.pool.experts, bench.pool.roles))
        tracked.figure(plots.similarity(cosines.tolist(), list(bench.pool.experts)), "plots/task_vector_cosines.png")


def _bar(fabric: Fabric, total: int | None, what: str, delay_s: float = 0) -> tqdm:
    """A progress bar for rank zero at a terminal; not for what takes less than `delay_s`."""
    return tqdm(total=total, desc=what, unit="row", delay=delay_s, disable=True if fabric.global_rank else None)
