"""The trials of a study: what the dead left is taken up, workers do the rest, MLflow is made to agree."""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning

from harness.nested import Children, experiment_of
from harness.record import Run
from harness.trials import devices_of
from studies.agree import agree, remaining, take_up, worked_on
from studies.crew import HOPELESS, PARTS, Alone, Crew, Shared
from studies.finished import rows
from studies.objectives import Objective
from studies.plan import Plan
from studies.progress import Progress, best
from studies.worker import EXHAUSTED, Errand, work

ORPHANS_S = 10  # how long workers of a parent that was killed are given to notice


def recover(study: optuna.Study, children: Children, tags: Mapping[str, str]) -> None:
    """Take up what the dead have left."""
    deadline = time.monotonic() + ORPHANS_S
    while worked_on(study) and time.monotonic() < deadline:
        time.sleep(0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    taken = take_up(study, "its worker was gone when the study was resumed", died=True, spare=worked_on(study))
    mended = agree(study, children, tags)
    if taken or mended:
        told = ", ".join(map(str, taken)) or "none"
        print(f"crucible: resumed; trials taken up: {told}; {mended} child runs brought up to date", file=sys.stderr)


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


def search(
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
    idle = 0
    try:
        while (left := remaining(study, planned.trials)) and (until is None or time.time() < until):
            found = _round(planned, study, str(tracked.id), tags, left, until, curve)
            totals = {part: totals.get(part, 0.0) + found[part] for part in PARTS}
            take_up(study, "its worker died", died=True, spare=worked_on(study))
            idle = idle + 1 if remaining(study, planned.trials) == left else 0
            if found[EXHAUSTED] or idle == HOPELESS:
                break
    except KeyboardInterrupt:
        take_up(study, "stopped by the user", died=False, spare=worked_on(study))
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

    with tempfile.TemporaryDirectory(prefix="crucible-") as place:
        tickets = Shared(left, processes, until, Path(place))
        crew = Crew(errand, tickets, devices_of(planned.config), died, curve.update)
        crew.run()
    return crew.totals | {EXHAUSTED: float(crew.exhausted)}


def shares(tracked: Run, totals: Mapping[str, float]) -> None:
    """What the workers' time went into."""
    for part, seconds in totals.items():
        tracked.metric(f"time/{part}_s", seconds)
        if part in PARTS[:4] and totals.get("total"):
            tracked.metric(f"time/{part}_share", seconds / totals["total"])
