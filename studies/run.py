"""A study from its settings to its report: open or resume, search, score the winner on test, record."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from harness.compose import flat, to_yaml
from harness.config import UserError, closest
from harness.nested import Children, exists, point
from harness.provenance import is_dead, process_tags
from harness.record import Run
from harness.track import open_run
from studies.agree import on_stale
from studies.finished import Finished, rows
from studies.plan import Plan, plan, warn
from studies.report import report
from studies.search import recover, search, shares
from studies.settings import Composed
from studies.signature import Signature, differences, signature
from studies.starts import starts_of
from studies.storage import open_storage
from studies.winners import crown, why_none

PARENT, RUNNING, SIGNATURE = "crucible.parent", "crucible.running", "crucible.signature"  # attributes of a study


def run_study(composed: Composed) -> Finished:
    """Search, score the winner, record.

    Raises:
        UserError: The input is bad, or no trial came to an end; the message says why.
    """
    planned = plan(composed)
    settings = planned.settings
    warn(planned)
    storage = open_storage(planned.storage_url, settings.heartbeat_s, on_stale)
    study = _opened(planned, storage)
    started = time.perf_counter()
    with _owned(study), _parent(planned, study) as tracked:
        children = Children.of(str(tracked.id))
        tags = {"study": study.study_name, "pool": planned.config.pool_name, "tasks": planned.config.tasks_name}
        if settings.resume:
            recover(study, children, tags)
        totals = search(planned, study, tracked, children, tags)
        shares(tracked, totals)
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
        report(finished)
        if not winners:
            raise UserError(why_none(finished.rows))
    return finished


def _opened(planned: Plan, storage: BaseStorage) -> optuna.Study:
    """The study, new or as it was left.

    Raises:
        UserError: The name is taken, or there is no such study, or it searched something else.
    """
    settings = planned.settings
    taken = optuna.get_all_study_names(storage)
    own = signature(planned.space, planned.objectives, planned.bounds, planned.config)
    starts = starts_of(planned.space, settings, storage)
    if settings.resume:
        if settings.name not in taken:
            hint = closest(str(settings.name), taken)
            raise UserError(f"study.name={settings.name}: {planned.storage_url} has no such study; {hint}")
        study = optuna.load_study(study_name=settings.name, storage=storage)
        if SIGNATURE not in study.user_attrs:  # killed while it was being made
            return _furnished(study, planned, own, starts)
        changed = differences(study.user_attrs[SIGNATURE], own)
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
    directions = [StudyDirection[objective.direction.upper()] for objective in planned.objectives]
    try:
        study = optuna.create_study(study_name=name, storage=storage, directions=directions)
    except DuplicatedStudyError:  # another command took the name in this moment
        return _opened(planned, storage)
    return _furnished(study, planned, own, starts)


def _furnished(study: optuna.Study, planned: Plan, own: Signature, starts: Sequence[Mapping[str, Any]]) -> optuna.Study:
    """A study with what it is told at its beginning; the signature comes last and says that all of it is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([objective.metric for objective in planned.objectives])
    for start in starts:
        study.enqueue_trial(dict(start), skip_if_exists=True)
    study.set_user_attr(SIGNATURE, own)
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
