"""What a study leaves on its own run: the description, tables of the trials and of the best parameters, plots."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.report import SHARES

if TYPE_CHECKING:
    from studies.finished import Finished, TrialRow, Winner

MOST_PARAMS = 16  # rows of a table in the description, which MLflow cuts at 8,000 characters; the artifacts have all
MOST_WINNERS = 12
PARTS = ("merge", "evaluate", "optuna", "mlflow")  # of a trial's time
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


def report(finished: Finished) -> None:
    """Write all of it to the study's run, which is still open.

    Writes trials.json, best_params.json, plots/*.png, plots/study.html and the run's description.
    """
    run = finished.tracked
    importances = _importances(finished)
    run.table([_trial(row, finished) for row in finished.rows], "trials.json")
    best = best_params(finished, importances)
    if best:
        run.table(best, "best_params.json")
    left_out = _plots(finished) if finished.settings.plots else {}
    run.describe(description(finished, importances, left_out))


def description(finished: Finished, importances: Mapping[str, float], left_out: Mapping[str, str]) -> str:
    """The Markdown at the head of the study's page.

    Args:
        finished: The study.
        importances: Parameter -> its share in how the first objective differs; may be empty.
        left_out: Plots that were not drawn -> why.
    """
    parts = [_headline(finished)]
    if finished.winners:
        parts.append(_front(finished) if len(finished.winners) > 1 else _best(finished, importances))
        parts.append(_repeat(finished.winners))
    parts += [_searched(finished), _time(finished), _look(finished)]
    if left_out:
        parts.append("Plots left out: " + "; ".join(f"{name} ({why})" for name, why in left_out.items()) + ".")
    return "\n\n".join(part for part in parts if part) + "\n"


def best_params(finished: Finished, importances: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each parameter of each winner, the most important first."""
    return [
        {"trial": winner.trial.number, "parameter": name, "value": value, "importance": importances.get(name)}
        for winner in finished.winners
        for name, value in _ordered(winner.trial.params, importances)
    ]


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Share of the workers' time that each part took, what is left as `other`; {} where no time is known.

    >>> shares({"merge": 1.0, "evaluate": 6.0, "optuna": 0.5, "mlflow": 0.5, "total": 8.0})["evaluate"]
    0.75
    """
    total = seconds.get("total")
    if not total:
        return {}
    found = {part: seconds.get(part, 0.0) / total for part in PARTS}
    return found | {"other": max(0.0, 1 - math.fsum(found.values()))}


def _importances(finished: Finished) -> dict[str, float]:
    from studies.plots import importances

    return importances(finished.study)


def _plots(finished: Finished) -> dict[str, str]:
    """Draw and keep the plots; what was left out, with the reason."""
    from studies.plots import draw, page

    drawn = draw(finished.study, [objective.metric for objective in finished.objectives])
    for plot in drawn.plots:
        finished.tracked.figure(plot.still, f"plots/{plot.name}.png")
    finished.tracked.text(page(drawn, f"Study {finished.study.study_name}"), "plots/study.html")
    return drawn.left_out


def _trial(row: TrialRow, finished: Finished) -> dict[str, Any]:
    """A trial as a row of the table: what it tried, what came of it, what it cost."""
    metrics = [objective.metric for objective in finished.objectives]
    values = dict(zip(metrics, row.values, strict=True)) if row.values else {}
    return {
        "trial": row.number,
        "state": _STATES.get(row.state, row.state.lower()),
        **{metric: values.get(metric) for metric in metrics},
        **row.params,
        **{f"validation {name}": value for name, value in row.metrics.items() if name not in values},
        **{f"constraint {name}": value for name, value in row.constraints.items()},
        **({"feasible": row.feasible} if row.constraints else {}),
        "steps": row.steps,
        **{f"{part}_s": round(seconds, 4) for part, seconds in row.seconds.items()},
        "reason": row.reason,
        "retry_of": row.retry_of,
        "run": row.run_id,
    }


def _headline(finished: Finished) -> str:
    counts = Counter(_STATES.get(row.state, row.state.lower()) for row in finished.rows)
    trials = f"{_count(len(finished.rows), 'trial')} ({', '.join(f'{n} {state}' for state, n in counts.items())})"
    where = f"**{finished.config.pool_name}**, scored on {finished.config.tasks_name}"
    methods = ", ".join(finished.settings.methods) or finished.config.method_name
    split = finished.settings.split
    if not finished.winners:
        return f"**{methods}** on {where}: {trials} by {finished.settings.sampler}, none that can win."
    if len(finished.winners) > 1:
        names = " against ".join(f"{each.metric} ({each.direction}d)" for each in finished.objectives)
        n = len(finished.winners)
        return (
            f"**{methods}** on {where}: {n} trials are best, each in its own way, of {trials}, by {names} on {split}."
        )
    winner = finished.winners[0]
    reached = ", ".join(
        f"**{_shown(objective.metric, value)}** {_plain(objective.metric)}"
        for objective, value in zip(finished.objectives, winner.trial.values or (), strict=True)
    )
    return f"**{methods}** on {where}: {reached} on {split} by trial {winner.trial.number}, the best of {trials}."


def _best(finished: Finished, importances: Mapping[str, float]) -> str:
    winner = finished.winners[0]
    lines = ["| parameter | best | importance |", "|---|---:|---:|"]
    ordered = _ordered(winner.trial.params, importances)
    lines += [f"| {_plain(name)} | {_value(value)} | {_percent(importances.get(name))} |" for name, value in ordered]
    shown = lines[: 2 + MOST_PARAMS]
    more = len(lines) - len(shown)
    note = f"\n\n{_count(more, 'more parameter')} in `best_params.json`." if more else ""
    return f"{_test(winner, finished)}\n\n" + "\n".join(shown) + note


def _test(winner: Winner, finished: Finished) -> str:
    """What the winner reached on test: each objective there, the interval, further seeds."""
    parts = []
    for metric in _on_test(winner, finished):
        text = f"**{_shown(metric, winner.metrics[metric])}** {_plain(metric)}"
        if metric in winner.interval:
            low, high = winner.interval[metric]
            text += f" (95 % of resamplings lie from {_shown(metric, low)} to {_shown(metric, high)})"
        found = [metrics[metric] for metrics in winner.seeds.values() if metric in metrics]
        if found:
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            text += f"; {_count(len(found), 'further seed')}: {_shown(metric, statistics.fmean(found))}"
            text += f", standard deviation {_spread(metric, spread)}" if len(found) > 1 else ""
        parts.append(text)
    split = winner.config.evaluation.split
    if not parts:
        return f"The best trial was not scored on {split}."
    return f"Scored once on {split}: {'. '.join(parts)}."


def _on_test(winner: Winner, finished: Finished) -> list[str]:
    """The objectives that the final run measured too; where it measured none, the averages."""
    named = [objective.metric for objective in finished.objectives if objective.metric in winner.metrics]
    return named or [name for name in winner.metrics if name.startswith("average/")]


def _front(finished: Finished) -> str:
    """The Pareto front as a table: values in the search, and on test."""
    metrics = [objective.metric for objective in finished.objectives]
    split = finished.winners[0].config.evaluation.split
    tested = [metric for metric in metrics if any(metric in winner.metrics for winner in finished.winners)]
    heads = ["trial", *metrics, *(f"{metric} on {split}" for metric in tested), "parameters"]
    lines = [_line(heads), _line(["---:"] * (len(heads) - 1) + ["---"])]
    for winner in finished.winners[:MOST_WINNERS]:
        values = [_shown(metric, value) for metric, value in zip(metrics, winner.trial.values or (), strict=True)]
        found = [_shown(metric, winner.metrics[metric]) if metric in winner.metrics else "-" for metric in tested]
        params = list(winner.trial.params.items())
        told = ", ".join(f"{_plain(name)}={_value(value)}" for name, value in params[:4])
        cut = ", ..." if len(params) > 4 else ""
        lines.append(_line([str(winner.trial.number), *values, *found, told + cut]))
    more = len(finished.winners) - MOST_WINNERS
    note = f"\n\n{_count(more, 'more trial')} of the front in `best_params.json`." if more > 0 else ""
    return "\n".join(lines) + note


def _repeat(winners: Sequence[Winner]) -> str:
    which = "the winner" if len(winners) == 1 else f"trial {winners[0].trial.number}; the others stand in `front/`"
    command = winners[0].command
    if len(command) > 1500 and winners[0].run_id:
        command = f"crucible run --from-run {winners[0].run_id}"
    return f"Repeat {which}:\n\n```bash\n{command}\n```"


def _searched(finished: Finished) -> str:
    told = finished.space.told()
    lines = ["| searched | in |", "|---|---|"]
    lines += [f"| {_plain(name)} | {_plain(words)} |" for name, words in list(told.items())[:MOST_PARAMS]]
    more = len(told) - MOST_PARAMS
    note = f"\n\nand {more} more." if more > 0 else ""
    settings = finished.settings
    pruner = "" if settings.pruner == "none" else f", pruned by {settings.pruner}"
    limits = "; ".join(
        f"{metric} {bound.replace('_', ' ')} {value}"
        for metric, each in settings.constraints.items()
        for bound, value in each.items()
    )
    held = f", held to {limits}" if limits else ""
    seeds = f", {settings.repeats} seeds each" if settings.repeats > 1 else ""
    return f"Sampler {settings.sampler}{pruner}{held}{seeds}.\n\n" + "\n".join(lines) + note


def _time(finished: Finished) -> str:
    timed = [row.seconds["total"] for row in finished.rows if row.seconds.get("total")]
    each = f", {statistics.median(timed):.2g} s a trial" if timed else ""
    told = ", ".join(f"{part} {_percent(share)}" for part, share in shares(finished.totals).items())
    beside = finished.totals.get("mlflow_beside")  # a thread of its own sends what trials leave
    besides = f"; MLflow took {beside:.1f} s beside them" if beside else ""
    where = f" A trial's time: {told}{besides}." if told else ""
    return f"{finished.seconds:.0f} s with {_count(finished.workers, 'worker')}{each}.{where}"


def _look(finished: Finished) -> str:
    return (
        "Every trial is a run below this one: mark them in the experiment's list (filter "
        f'`tags."mlflow.parentRunId" = "{finished.parent}"`) and press *Compare* for parallel coordinates, scatter and '
        "contour plots. Under *Artifacts*: `plots/study.html` (all plots, to hover over), `trials.json`, "
        "`best_params.json`, `best_config.yaml`."
    )


def _ordered(params: Mapping[str, Any], importances: Mapping[str, float]) -> list[tuple[str, Any]]:
    return sorted(params.items(), key=lambda item: -importances.get(item[0], 0.0))


def _shown(metric: str, value: float) -> str:
    """A value as it is read: shares as percentages.

    >>> _shown("worst/accuracy", 0.4321), _shown("time/merge_s", 1.23456)
    ('43.2 %', '1.235')
    """
    return _percent(value) if metric.rpartition("/")[2] in SHARES else f"{value:.4g}"


def _spread(metric: str, value: float) -> str:
    return f"{100 * value:.2f} points" if metric.rpartition("/")[2] in SHARES else f"{value:.3g}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _plain(str(value))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


def _count(n: int, what: str) -> str:
    return f"1 {what}" if n == 1 else f"{n} {what}s"
