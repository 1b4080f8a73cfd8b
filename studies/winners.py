"""The end of a study: the best trial, or each of the front, scored once on test, with seeds and intervals."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import optuna

from harness.bootstrap import intervals
from harness.compose import to_yaml
from harness.config import RunConfig, UserError
from harness.nested import Children
from harness.record import Run
from harness.registry import register
from harness.run import run
from harness.trials import Resident
from methods.catalogue import find
from studies.finished import TrialRow, Winner, row_of, rows
from studies.progress import best_in_words

if TYPE_CHECKING:
    from studies.plan import Plan


def crown(
    planned: Plan, study: optuna.Study, tracked: Run, children: Children, tags: Mapping[str, str]
) -> list[Winner]:
    """Score the best trials on test and record them; none where no trial came to an end or keeps to the constraints."""
    found = [row_of(trial) for trial in study.best_trials]
    if len(planned.objectives) == 1:
        found = found[:1]
    winners: list[Winner] = []
    for row in found:
        config = _final(planned, row, study.study_name)
        outcome = run(config, parent=str(tracked.id))
        winner = Winner(
            trial=row,
            config=config,
            yaml=to_yaml(_plain(config, planned)),
            command=_command(planned, row),
            run_id=outcome.run_id,
            metrics=dict(outcome.metrics) | {f"{s.task}/{s.metric}": s.value for s in outcome.scores},
            model_uri=outcome.model_uri,
        )
        winners.append(_further(planned, winner, children, tags))
    if winners:
        _record(planned, study, tracked, winners)
    return winners


def _final(planned: Plan, row: TrialRow, name: str) -> RunConfig:
    """A trial's configuration for the test split."""
    config = _on_final_split(planned.space.config(row.params), planned)
    own = {**config.tracking.tags, "study": name, "crucible.role": "winner", "crucible.winner_of": str(row.number)}
    tracking = replace(config.tracking, tags=own, run_name=f"best of {name}: {row.name}")
    return replace(config, tracking=tracking)


def _on_final_split(config: RunConfig, planned: Plan) -> RunConfig:
    split = planned.composed.configs[config.method_name].evaluation.split
    return replace(config, evaluation=replace(config.evaluation, split=split))


def _plain(config: RunConfig, planned: Plan) -> RunConfig:
    """The configuration without the study's own tags and name."""
    return replace(config, tracking=planned.composed.configs[config.method_name].tracking)


def _command(planned: Plan, row: TrialRow) -> str:
    """A shell line that repeats a trial on the final split."""
    method, values = planned.space.values(row.params)
    given = [text for text in planned.composed.overrides if not text.startswith("method=")]
    values_given = [f"{key}={_spelled(value)}" for key, value in values.items()]
    return shlex.join(["crucible", "run", *given, f"method={method}", *values_given])


def _spelled(value: Any) -> str:
    """A value in the words of an override."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_spelled(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_spelled, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def _further(planned: Plan, winner: Winner, children: Children, tags: Mapping[str, str]) -> Winner:
    """The winner with further seeds, where its method draws random numbers, and with intervals."""
    settings, config = planned.settings, winner.config
    row = find(config.method_name)
    random = row.random or bool(row.loss)
    seeds = range(config.seed + settings.repeats, config.seed + settings.repeats + settings.final_seeds)
    if not (random and seeds) and not settings.bootstrap:
        return winner
    resident = Resident(config, search_on_test=True)
    scored: dict[int, dict[str, float]] = {}
    examples = [resident.rows(config, config.seed)]
    for seed in seeds if random else ():
        metrics: Mapping[str, float] = {}
        for step in resident.score(config, seed):
            metrics = step.metrics
        scored[seed] = dict(metrics)
        examples.append(resident.rows(config, seed))
        own = {**tags, "kind": "seed", "seed": str(seed), "crucible.winner_of": str(winner.trial.number)}
        run_id = children.begin(f"seed {seed} of {winner.trial.name}", own)
        children.end(run_id, "FINISHED", {**winner.trial.params, "seed": seed}, metrics, {})
    found = intervals(examples, settings.bootstrap)
    interval = {f"{name}/accuracy": span for name, span in found.items()}
    if winner.run_id is not None:
        children.note(winner.run_id, _spans(interval) | _spread(winner, scored))
    return replace(winner, seeds=scored, interval=interval)


def _spans(interval: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    return {f"{name}_{end}": value for name, span in interval.items() for end, value in zip(("low", "high"), span)}  # noqa: B905


def _spread(winner: Winner, scored: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Mean and standard deviation over the winner's own seed and the further ones."""
    if not scored:
        return {}
    import statistics

    found = {}
    for name in winner.metrics:
        values = [winner.metrics[name], *(each[name] for each in scored.values() if name in each)]
        if len(values) == len(scored) + 1:
            found[f"seeds/{name}/mean"] = statistics.fmean(values)
            found[f"seeds/{name}/spread"] = statistics.stdev(values)
    return found


def _record(planned: Plan, study: optuna.Study, tracked: Run, winners: list[Winner]) -> None:
    """What the parent run says of its winners."""
    first = winners[0]
    split = first.config.evaluation.split
    for name, value in first.metrics.items():
        tracked.metric(f"{split}/{name}", value)
    for name, value in _spans(first.interval).items():
        tracked.metric(f"{split}/{name}", value)
    for name, value in _spread(first, first.seeds).items():
        tracked.metric(f"{split}/{name}", value)
    tags = {"best_trial": str(first.trial.number), "best_run": str(first.run_id), "best_name": first.trial.name}
    tags |= {f"best_param.{name}": str(value) for name, value in first.trial.params.items()}
    tags["best"] = best_in_words(rows(study), planned.objectives)
    tracked.tags(tags)
    for index, winner in enumerate(winners):
        tracked.text(winner.yaml, "best_config.yaml" if index == 0 else f"front/config_{winner.trial.number}.yaml")
    settings = planned.settings
    if settings.register is not None:
        if first.model_uri is None:
            raise UserError("study.register: the winner's model was not logged; set tracking.log_model=true")
        place = register(first.model_uri, settings.register, settings.alias, {"study": study.study_name})
        tracked.tag("registered", place)


def why_none(found: Sequence[TrialRow]) -> str:
    """Why there is no winner."""
    if any(row.state == "COMPLETE" for row in found):
        return "study: no trial keeps to study.constraints; loosen them, or search longer with study.resume=true"
    reasons = list(dict.fromkeys(row.reason for row in found if row.reason))
    told = "\n".join(f"  - {reason}" for reason in reasons[:5])
    return f"study: none of {len(found)} trials came to an end:\n{told}" if told else "study: no trial came to an end"
