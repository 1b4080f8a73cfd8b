"""The second half of a run: score the model, compare it with base and experts, record what was found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from tqdm import tqdm

from harness import learning_plots, plots, report
from harness.bench import Bench
from harness.compress import by_task
from harness.config import RunConfig
from harness.evaluate import TaskScore, evaluate
from harness.execute import sum_over_devices
from harness.inputs import Inputs
from harness.look import task_vector_cosines
from harness.make import Made
from harness.references import References, references
from harness.track import Run
from methods.mixtures import routing


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    run_id: str | None  # None on every rank but zero
    scores: tuple[TaskScore, ...]
    references: References
    metrics: Mapping[str, float]
    model_uri: str | None = None  # of the logged model


def assess(
    config: RunConfig, bench: Bench, fabric: Fabric, tracked: Run, module: nn.Module | None, made: Made | None
) -> Outcome:
    """Score the module, compare it with base and experts, record it all; without one there is nothing to score.

    Raises:
        TaskError: A task does not fit the model; the message says how.
    """
    scores: list[TaskScore] = []
    asked: list[dict[str, Any]] = []
    if module is not None:
        scores = _scored(config, bench, fabric, tracked, module)
        asked = _asked(config, bench, fabric, tracked, module)
    known = References()
    if config.evaluation.references and bench.tasks:
        with tracked.phase("references"), _bar(fabric, None, "scoring base and experts", delay_s=0.5) as bar:
            known = references(fabric, bench, config.evaluation, config.seed, bar.update)
    metrics = summarise(scores, known)
    for key, value in metrics.items():
        tracked.metric(key, value)
    if fabric.is_global_zero:
        _record(config, bench, tracked, scores, known, metrics, made, asked)
    return Outcome(tracked.id, tuple(scores), known, metrics, tracked.model.uri if tracked.model else None)


def _scored(config: RunConfig, bench: Bench, fabric: Fabric, tracked: Run, module: nn.Module) -> list[TaskScore]:
    """The module's score on every task, recorded as it comes."""
    tasks = bench.evaluation(config.evaluation, config.seed, bench.reader)
    if not tasks:
        return []
    scores = []
    routes: list[dict[str, Any]] = []
    names = list(bench.pool.experts)
    routing(module, names)  # what was asked before does not count

    def total(counts: torch.Tensor) -> torch.Tensor:
        return sum_over_devices(fabric, counts.to(fabric.device))

    chosen = by_task(module, tasks)
    with tracked.phase("evaluate"), _bar(fabric, sum(map(len, tasks.values())), "evaluating") as bar:
        for task, examples in tasks.items():
            own = {task: examples}
            for found in evaluate(fabric, chosen(task), own, config.evaluation.batch_size, bar.update):
                for name, value in {found.metric: found.value, "loss": found.loss, **found.more}.items():
                    tracked.metric(f"{found.task}/{name}", value)
                scores.append(found)
            routes += [{"task": task, **row} for row in routing(module, names, total)]
    if routes:
        tracked.table(routes, "routing.json")
        if config.evaluation.plots and fabric.is_global_zero:
            tracked.figure(learning_plots.routing(routes, names, config.method_name), "plots/routing.png")
    return scores


def _asked(config: RunConfig, bench: Bench, fabric: Fabric, tracked: Run, module: nn.Module) -> list[dict[str, Any]]:
    """What lm-evaluation-harness finds, recorded: a row for each metric; on rank zero, the others wait."""
    rows: list[dict[str, Any]] = []
    if bench.asked is not None and fabric.is_global_zero:
        tokenizer, family = getattr(bench.reader, "tokenizer"), config.pool.family  # noqa: B009
        with tracked.phase("lm_eval"):
            module = module.to(fabric.device)
            found = bench.asked.run(module, tokenizer, family, config.fabric.precision, config.seed)
        rows = found.rows
        for row in rows:
            tracked.metric(f"{row['task']}/{row['metric']}", row["value"])
            if row["stderr"] is not None:
                tracked.metric(f"{row['task']}/{row['metric']}_stderr", row["stderr"])
        for task, n in found.n.items():
            tracked.metric(f"{task}/n", n)
        tracked.params({f"lm_eval.version.{task}": version for task, version in found.versions.items()})
        tracked.table(rows, "lm_eval.json")
        for task, lines in found.samples.items():
            tracked.text(lines, f"lm_eval/{task}.jsonl")
    fabric.barrier()
    return rows


def summarise(scores: Sequence[TaskScore], known: References) -> dict[str, float]:
    """Means over tasks, the worst task, and each score over its own expert's, as fusion papers report.

    Scores are averaged within a metric: shares by their arithmetic mean, perplexities by their geometric one.
    """
    if not scores:
        return {}
    metrics = {"average/loss": math.fsum(score.loss for score in scores) / len(scores)}
    for metric in dict.fromkeys(score.metric for score in scores):
        own = [score for score in scores if score.metric == metric]
        values = [score.value for score in own]
        metrics[f"average/{metric}"] = report.mean(metric, values)
        metrics[f"worst/{metric}"] = min(values) if own[0].higher_is_better else max(values)
    shares = [report.share(score.metric, score.value, known.experts.get(score.task)) for score in scores]
    present = [share for share in shares if share is not None]
    if len(present) == len(shares):
        metrics["average/normalized"] = math.fsum(present) / len(present)
        metrics["worst/normalized"] = min(present)
    return metrics


def _record(
    config: RunConfig,
    bench: Bench,
    tracked: Run,
    scores: list[TaskScore],
    known: References,
    metrics: Mapping[str, float],
    made: Made | None,
    asked: list[dict[str, Any]],
) -> None:
    """Table, plots, description."""
    results = report.results(scores, known.experts, known.base)
    if results:
        tracked.table(results, "results.json")
    tracked.describe(
        report.description(
            method=config.method_name if config.model is None else str(config.model),
            pool=config.pool_name,
            results=results,
            metrics=metrics,
            run_id=str(tracked.id),
            model_uri=tracked.model.uri if tracked.model else None,
            family=config.pool.family,
            asked=asked,
        )
    )
    if config.evaluation.plots:
        with tracked.phase("plots"):
            _plot(bench, tracked, results, made)


def _plot(bench: Bench, tracked: Run, results: list[dict[str, Any]], made: Made | None) -> None:
    shown, what = plots.comparable(results)
    if shown:
        tracked.figure(plots.bars(shown, what), f"plots/{what}.png")
        tracked.figure(plots.radar(shown, what), "plots/radar.png")
    if made is not None and made.coefficients is not None:
        names = list(bench.pool.experts)
        tracked.figure(plots.coefficients(made.coefficients, names), "plots/coefficients.png")
    if bench.pool.base is not None and len(bench.pool.experts) > 1:
        cosines = task_vector_cosines(Inputs(bench.pool.base, bench.pool.experts, bench.pool.roles))
        tracked.figure(plots.similarity(cosines.tolist(), list(bench.pool.experts)), "plots/task_vector_cosines.png")


def _bar(fabric: Fabric, total: int | None, what: str, delay_s: float = 0) -> tqdm:
    """A progress bar for rank zero at a terminal; not for what takes less than `delay_s`."""
    return tqdm(total=total, desc=what, unit="row", delay=delay_s, disable=True if fabric.global_rank else None)
