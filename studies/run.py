"""A study from its settings to its report: open or resume, search, score the winner on test, record."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from harness.compose import flat, to_yaml
from harness.config import ConfigError, RunConfig, UserError, closest
from harness.nested import Children, exists, experiment_of, point, tracking_uri
from harness.provenance import is_dead, process_tags
from harness.record import Run
from harness.track import open_run
from harness.trials import depth_of, devices_of, refuse_test
from studies.agree import agree, on_stale, orphans, remaining, take_up
from studies.coefficients import Depth, needs_depth
from studies.crew import PARTS, Alone, Crew, Shared
from studies.finished import OWNER, Finished, rows
from studies.objectives import Bound, Objective, bounds_of, objectives_of
from studies.progress import Progress, best
from studies.samplers import size_of, unfit
from studies.settings import Composed, StudySettings
from studies.signature import differences, signature
from studies.space import Space, space_of
from studies.starts import enqueue
from studies.storage import default_url, open_storage
from studies.winners import crown
from studies.worker import EXHAUSTED, Errand, work

PARENT, RUNNING, SIGNATURE = "crucible.parent", "crucible.running", "crucible.signature"  # attributes of a study
ORPHANS_S = 10  # how long workers of a parent that was killed are given to notice


@dataclass(frozen=True)
class Plan:
    """A study that has been checked; nothing has begun."""

    composed: Composed
    space: Space
    objectives: tuple[Objective, ...]
    bounds: tuple[Bound, ...]
    storage_url: str
    trials: int

    @property
    def settings(self) -> StudySettings:
        """The study's settings."""
        return self.composed.settings

    @property
    def config(self) -> RunConfig:
        """What trials vary, of the first method."""
        return next(iter(self.space.configs.values()))


def plan(composed: Composed) -> Plan:
    """Check all that can be checked before anything is opened.

    Raises:
        UserError: All that is wrong.
    """
    settings = composed.settings
    final = next(iter(composed.configs.values())).evaluation.split
    if settings.split == final and not settings.search_on_test:
        raise UserError(
            f"study.split={settings.split} is evaluation.split too: the winner would be judged by the rows that it was "
            "chosen on; search on another split, or say study.search_on_test=true"
        )
    refuse_test(settings.split, settings.search_on_test)
    configs = {
        method: replace(config, evaluation=replace(config.evaluation, split=settings.split))
        for method, config in composed.configs.items()
    }
    first = next(iter(configs.values()))
    faults = [
        f"study.split={settings.split}: task {name} has no such split; it has {', '.join(task.splits)}"
        for name, task in first.tasks.tasks.items()
        if settings.split not in task.splits
    ]
    if not first.tasks.tasks:
        raise ConfigError(["study: there are no tasks to score trials on; choose some with tasks=NAME"])
    objectives = objectives_of(settings.objectives, first, faults)
    bounds = bounds_of(settings.constraints, first, faults)
    depth = Depth(*depth_of(first)) if needs_depth(settings) else None
    space: Space | None = None
    try:
        space = space_of(settings, configs, depth)
    except ConfigError as error:
        faults += error.faults
    if space is not None:
        faults += unfit(settings, space, objectives)
        seeded = any(axis.key == "seed" for axis in space.axes)
        if seeded and settings.repeats > 1:
            faults.append("study.repeats: seeds are searched (study.space.seed) or averaged over, not both")
    if faults or space is None:
        raise ConfigError(faults)
    size = size_of(settings, space)
    trials = settings.trials if size is None else min(settings.trials, size)
    return Plan(composed, space, objectives, bounds, settings.storage or default_url(tracking_uri()), trials)


def run_study(composed: Composed) -> Finished:
    """Search, score the winner, record.

    Raises:
        UserError: The input is bad, or no trial came to an end; the message says why.
    """
    planned = plan(composed)
    settings = planned.settings
    _warn(planned)
    storage = open_storage(planned.storage_url, settings.heartbeat_s, on_stale)
    study = _opened(planned, storage)
    started = time.perf_counter()
    with _owned(study), _parent(planned, study) as tracked:
        children = Children.of(str(tracked.id))
        tags = {"study": study.study_name, "pool": planned.config.pool_name, "tasks": planned.config.tasks_name}
        if settings.resume:
            _recover(study, children, tags)
        totals = _search(planned, study, tracked, children, tags)
        _shares(tracked, totals)
        winners = crown(planned, study, tracked, children, tags)
        finished = Finished(
            study,
            settings,
            planned.space,
            planned.objectives,
            planned.config,
            str(tracked.id),
            tracked,
            rows(study),
            winners,
            time.perf_counter() - started,
            settings.workers,
            totals,
        )
        if importlib.util.find_spec("studies.report") is not None:
            importlib.import_module("studies.report").report(finished)
    return finished


# -- opening -----------------------------------------------------------------------------------------------------------


def _opened(planned: Plan, storage: BaseStorage) -> optuna.Study:
    """The study, new or as it was left.

    Raises:
        UserError: The name is taken, or there is no such study, or it searched something else.
    """
    settings = planned.settings
    taken = optuna.get_all_study_names(storage)
    own = signature(planned.space, planned.objectives, planned.bounds, planned.config)
    if settings.resume:
        if settings.name not in taken:
            hint = closest(str(settings.name), taken)
            raise UserError(f"study.name={settings.name}: {planned.storage_url} has no such study; {hint}")
        study = optuna.load_study(study_name=settings.name, storage=storage)
        changed = differences(study.user_attrs.get(SIGNATURE, {}), own)
        if changed:
            told = "\n".join(f"  - {line}" for line in changed)
            raise UserError(
                f"study {settings.name} cannot be resumed, it would not be the same study any more:\n{told}\n"
                "give it as it was, or begin another one under another study.name"
            )
        return study
    if settings.name in taken:
        raise UserError(
            f"study.name={settings.name}: there is such a study in {planned.storage_url}; study.resume=true goes on "
            "with it, another study.name begins a new one"
        )
    name = settings.name or _free(f"{' or '.join(planned.space.methods)} on {planned.config.pool_name}", taken)
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        directions=[StudyDirection[objective.direction.upper()] for objective in planned.objectives],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([objective.metric for objective in planned.objectives])
    study.set_user_attr(SIGNATURE, own)
    enqueue(study, planned.space, settings, storage)
    return study


def _free(name: str, taken: list[str]) -> str:
    number = 1
    while f"{name} {number}" in taken:
        number += 1
    return f"{name} {number}"


@contextmanager
def _owned(study: optuna.Study) -> Iterator[None]:
    """Have the study to ourselves.

    Raises:
        UserError: Another process of this machine is at it.
    """
    owner = study.user_attrs.get(RUNNING)
    own = process_tags()
    if owner and owner != own and owner.get("crucible.host") == own["crucible.host"] and not is_dead(owner):
        raise UserError(f"study {study.study_name} is being run by process {owner['crucible.pid']}; end that one first")
    study.set_user_attr(RUNNING, own)
    yield
    study.set_user_attr(RUNNING, None)


@contextmanager
def _parent(planned: Plan, study: optuna.Study) -> Iterator[Run]:
    """The parent run: a new one, or that of the study that is resumed."""
    settings, config = planned.settings, planned.config
    known = study.user_attrs.get(PARENT)
    if known is not None and exists(known):
        other = os.environ.pop("MLFLOW_RUN_ID", None)  # of `mlflow run`
        if other is not None and other != known:
            point(other, known, f"resumes {study.study_name}")
        os.environ["MLFLOW_RUN_ID"] = known
    tags = {
        "kind": "study",
        "study": study.study_name,
        "method": " ".join(planned.space.methods),
        "pool": config.pool_name,
        "tasks": config.tasks_name,
        "sampler": settings.sampler,
        **config.tracking.tags,
    }
    params = {**flat(config), **{f"study.{name}": value for name, value in asdict(settings).items()}}
    params["study.storage"] = planned.storage_url.rpartition("@")[2]
    params |= {f"space.{name}": told for name, told in planned.space.told().items()}
    with open_run(
        config.tracking.experiment,
        config.tracking.run_name or f"study {study.study_name}",
        tags,
        params,
        config=to_yaml(config),
    ) as tracked:
        study.set_user_attr(PARENT, tracked.id)
        print(f"crucible: study {study.study_name}, run {tracked.id}", file=sys.stderr)
        yield tracked


def _recover(study: optuna.Study, children: Children, tags: Mapping[str, str]) -> None:
    """Take up what the dead have left."""
    deadline = time.monotonic() + ORPHANS_S
    while (alive := orphans(study)) and time.monotonic() < deadline:
        time.sleep(0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    spare = _numbers_of(study, alive)
    taken = take_up(study, "its worker was gone when the study was resumed", died=True, spare=spare)
    mended = agree(study, children, tags)
    if taken or mended:
        told = ", ".join(map(str, taken)) or "none"
        print(f"crucible: resumed; trials taken up: {told}; {mended} child runs brought up to date", file=sys.stderr)


def _numbers_of(study: optuna.Study, owners: list[dict[str, str]]) -> set[int]:
    """Trials of owners that live, on other machines."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return {trial.number for trial in running if trial.user_attrs.get(OWNER) in owners}


# -- searching ---------------------------------------------------------------------------------------------------------


@dataclass
class _Curve:
    """The best values so far, recorded as trials end."""

    tracked: Run
    objectives: tuple[Objective, ...]
    progress: Progress
    study: optuna.Study
    seen: int = 0
    last: list[float | None] = field(default_factory=list)

    def update(self) -> None:
        """Look at the trials anew."""
        found = rows(self.study)
        ended = sum(row.state in ("COMPLETE", "PRUNED", "FAIL") for row in found)
        if ended == self.seen:
            return
        self.seen = ended
        values = best(found, self.objectives)
        for objective, value in zip(self.objectives, values, strict=True):
            if value is not None:
                self.tracked.metric(f"best/{objective.metric}", value, ended)
        self.progress.show(found)


def _search(
    planned: Plan, study: optuna.Study, tracked: Run, children: Children, tags: Mapping[str, str]
) -> dict[str, float]:
    """Do the trials; returns seconds of all workers by what they went into."""
    settings = planned.settings
    until = None if settings.timeout_s is None else time.time() + settings.timeout_s
    progress = Progress(
        study.study_name, planned.trials, planned.trials - remaining(study, planned.trials), planned.objectives
    )
    curve = _Curve(tracked, planned.objectives, progress, study)
    totals: dict[str, float] = {}
    try:
        while (left := remaining(study, planned.trials)) and (until is None or time.time() < until):
            found = _round(planned, study, str(tracked.id), tags, left, until, curve)
            totals = {part: totals.get(part, 0.0) + found[part] for part in PARTS}
            take_up(study, "its worker died", died=True)
            if found[EXHAUSTED] or remaining(study, planned.trials) == left:
                break
    except KeyboardInterrupt:
        take_up(study, "stopped by the user", died=False)
        agree(study, children, tags)
        print(
            f"crucible: study {study.study_name} goes on with study.resume=true study.name='{study.study_name}'",
            file=sys.stderr,
        )
        raise
    finally:
        curve.update()
        progress.close()
    agree(study, children, tags)
    return totals


def _round(
    planned: Plan,
    study: optuna.Study,
    parent: str,
    tags: Mapping[str, str],
    left: int,
    until: float | None,
    curve: _Curve,
) -> dict[str, float]:
    """Have the workers do so many trials."""
    settings = planned.settings
    processes = min(settings.workers, left)
    errand = Errand(
        planned.storage_url,
        study.study_name,
        settings,
        planned.space,
        planned.objectives,
        planned.bounds,
        parent,
        experiment_of(planned.config.tracking.experiment),
        planned.config.seed,
        tags,
        processes=processes,
        done=len(study.get_trials(deepcopy=False)),
    )
    if processes == 1:
        return work(errand, Alone(left, until), curve.update)

    def died(number: int, how: str) -> bool:
        reason = f"its worker was {how}" if how.startswith("killed") else f"its worker {how}"
        others = {row.number for row in rows(study) if row.state == "RUNNING" and row.number != number}
        take_up(study, reason, died=True, spare=others)
        return remaining(study, planned.trials) > 0 and any(
            row.state == "WAITING" and row.retry_of == number for row in rows(study)
        )

    crew = Crew(errand, Shared(left, processes, until), devices_of(planned.config), died, curve.update)
    crew.run()
    return crew.totals | {EXHAUSTED: float(crew.exhausted)}


def _warn(planned: Plan) -> None:
    """What is allowed and probably not meant."""
    settings = planned.settings
    devices = devices_of(planned.config)
    n = devices if devices is not None else os.cpu_count() or 1
    if settings.workers > n:
        kind = "GPUs" if devices is not None else "cores"
        print(
            f"crucible: study.workers={settings.workers}, and there are {n} {kind}: workers will share them",
            file=sys.stderr,
        )
    if planned.trials < settings.trials:
        print(f"crucible: the grid has {planned.trials} points, and so many trials are done", file=sys.stderr)


def _shares(tracked: Run, totals: Mapping[str, float]) -> None:
    """What the workers' time went into."""
    for part, seconds in totals.items():
        tracked.metric(f"time/{part}_s", seconds)
        if part in PARTS[:4] and totals.get("total"):
            tracked.metric(f"time/{part}_share", seconds / totals["total"])


def told(finished: Finished) -> list[tuple[str, str]]:
    """A study in words, for the terminal."""
    states = [row.state for row in finished.rows]
    lines = [("trials", ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))]
    for winner in finished.winners:
        lines.append(("best", f"trial {winner.trial.number}: {winner.trial.name}"))
        lines += [
            (
                objective.metric,
                f"{winner.trial.metrics[objective.metric]:.4f} on {finished.settings.split}, "
                f"{winner.metrics.get(objective.metric, float('nan')):.4f} on {winner.config.evaluation.split}",
            )
            for objective in finished.objectives
            if objective.metric in winner.metrics
        ]
        lines.append(("repeat it", winner.command))
    return lines
