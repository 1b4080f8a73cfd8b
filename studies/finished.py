"""What a study has come to: its trials as plain rows, its winners, and all that a report is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from harness.config import RunConfig
from studies.objectives import Objective
from studies.settings import StudySettings
from studies.space import Space

if TYPE_CHECKING:
    from harness.record import Run

RUNS = "crucible.runs"  # attribute of a study: trial -> child run, where that had to be made anew
OWNER, RESULT = "crucible.owner", "crucible.result"  # attributes of a trial, written when it begins and when it ends
HISTORY = "retry_history"  # Optuna's own word for the trials that one takes up anew
LOST = "its worker gave no sign of life"
STATES = {
    TrialState.COMPLETE: "COMPLETE",
    TrialState.PRUNED: "PRUNED",
    TrialState.FAIL: "FAIL",
    TrialState.RUNNING: "RUNNING",
    TrialState.WAITING: "WAITING",
}


@dataclass(frozen=True)
class TrialRow:
    """One trial as plain data."""

    number: int
    state: str  # of STATES
    values: tuple[float, ...] | None  # of a pruned trial over what it has scored
    params: Mapping[str, Any]  # by Optuna's names
    metrics: Mapping[str, float]  # on the search's split
    constraints: Mapping[str, float]  # zero or less is met
    feasible: bool
    run_id: str | None
    reason: str | None  # of a failure
    retry_of: int | None
    seconds: Mapping[str, float]  # merge, evaluate, optuna, mlflow, total
    steps: int
    started: datetime | None
    ended: datetime | None
    name: str


@dataclass(frozen=True)
class Winner:
    """A best trial, scored on test."""

    trial: TrialRow
    config: RunConfig  # as it was run
    yaml: str  # for `crucible run --from-config FILE`
    command: str  # a shell line that repeats it
    run_id: str | None
    metrics: Mapping[str, float]
    model_uri: str | None
    seeds: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # further seeds of a random method
    interval: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # metric -> 95 % interval


@dataclass(frozen=True)
class Finished:
    """A study that has ended, its parent run still open."""

    study: Study
    settings: StudySettings
    space: Space
    objectives: tuple[Objective, ...]
    config: RunConfig
    parent: str
    tracked: Run
    rows: Sequence[TrialRow]
    winners: Sequence[Winner]
    seconds: float
    workers: int
    totals: Mapping[str, float] = field(default_factory=dict)  # the workers' seconds by what they went into


def rows(study: Study) -> list[TrialRow]:
    """Every trial of a study, at any time."""
    runs = study.user_attrs.get(RUNS, {})
    return [row_of(trial, runs) for trial in study.get_trials(deepcopy=False)]


def row_of(trial: FrozenTrial, runs: Mapping[str, str] = {}) -> TrialRow:
    """One trial; `runs` are child runs that were made anew, by number."""
    result = trial.user_attrs.get(RESULT, {})
    history = trial.system_attrs.get(HISTORY) or [None]
    values = result.get("values", trial.values)
    return TrialRow(
        number=trial.number,
        state=STATES[trial.state],
        values=tuple(values) if values is not None else None,
        params=dict(trial.params),
        metrics=result.get("metrics", {}),
        constraints=dict(trial.constraints),
        feasible=all(value <= 0 for value in trial.constraints.values()),
        run_id=runs.get(str(trial.number), result.get("run_id")),
        reason=result.get("reason", LOST if trial.state is TrialState.FAIL else None),
        retry_of=history[-1],
        seconds=result.get("seconds", {}),
        steps=result.get("steps", len(trial.intermediate_values)),
        started=trial.datetime_start,
        ended=trial.datetime_complete,
        name=title(trial.params),
    )


def title(params: Mapping[str, Any]) -> str:
    """A trial's name: its parameters, the method first; many coefficients are counted."""
    shown = {name: value for name, value in params.items() if name != "method"}
    words = [str(params["method"])] if "method" in params else []
    short = {name.partition(".")[2] or name: value for name, value in shown.items()}
    words += [f"{name}={_short(value)}" for name, value in list(short.items())[:6]]
    return " ".join(words) + (f" and {len(short) - 6} more" if len(short) > 6 else "") or "defaults"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
