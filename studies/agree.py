"""After a death, a stop or a resumption: trials taken up anew, MLflow's runs brought to what Optuna says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress

import optuna
from optuna import Study
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from harness.nested import Child, Children
from harness.provenance import is_dead, process_tags
from studies.finished import HISTORY, OWNER, RESULT, RUNS, TrialRow, row_of

NUMBER, STATE = "crucible.trial", "crucible.state"  # tags of a child run
DEATHS = "crucible:deaths"  # attribute of a trial: how often a worker died with it
RETRIES = 1
ENDED = {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED", "FAIL": "FAILED"}
_CARRIED = ("fixed_params", "grid_id", "search_space")  # of Optuna's attributes, to a trial that is taken up anew


def remaining(study: Study, wanted: int) -> int:
    """How many trials are to be begun: what was taken up anew counts once, what runs counts."""
    trials = study.get_trials(deepcopy=False)
    retried = {number for trial in trials for number in trial.system_attrs.get(HISTORY, [])}
    spent = [trial for trial in trials if trial.state in ENDED | {TrialState.RUNNING} and trial.number not in retried]
    return max(0, wanted - len(spent))


def take_up(study: Study, reason: str, *, died: bool, spare: Collection[int] = ()) -> list[int]:
    """Queue the running trials whose workers are gone once more, and end them; returns their numbers.

    Args:
        study: The study.
        reason: What to say of them.
        died: Whether a worker died with them, which a trial may cause: that is tried again `RETRIES` times only.
        spare: Trials that are being worked on.
    """
    found = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.number in spare:
            continue
        requeue(study, trial, died=died)  # first: killed in between, we find the trial running and end it later
        end(study, trial, reason)
        found.append(trial.number)
    return found


def end(study: Study, trial: FrozenTrial, reason: str) -> None:
    """Mark a trial as failed, and say why; one that has ended meanwhile stays as it is."""
    with suppress(UpdateFinishedTrialError):
        study._storage.set_trial_user_attr(trial._trial_id, RESULT, {"reason": reason, "ended": "KILLED"})
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def requeue(study: Study, trial: FrozenTrial, *, died: bool) -> None:
    """Queue a trial's parameters once more, unless they are, or it has had its chances."""
    deaths = trial.system_attrs.get(DEATHS, 0) + (1 if died else 0)
    known = study.get_trials(deepcopy=False)
    if deaths > RETRIES or any(trial.number in other.system_attrs.get(HISTORY, []) for other in known):
        return
    attributes = {name: trial.system_attrs[name] for name in _CARRIED if name in trial.system_attrs}
    history = [*trial.system_attrs.get(HISTORY, []), trial.number]
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            system_attrs={**attributes, HISTORY: history, "failed_trial": history[0], DEATHS: deaths},
        )
    )


def on_stale(study: Study, trial: FrozenTrial) -> None:
    """What Optuna does with a trial that gave no sign of life, once it has marked it as failed."""
    requeue(study, trial, died=True)


def worked_on(study: Study) -> set[int]:
    """Running trials whose owners are other processes, not known to be dead; they may be of other machines."""
    own = process_tags()
    owners = {
        trial.number: trial.user_attrs.get(OWNER)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    }
    return {number for number, owner in owners.items() if owner and owner != own and not is_dead(owner)}


def agree(study: Study, children: Children, tags: Mapping[str, str]) -> int:
    """Bring the child runs to what Optuna's trials are: each one once, none left running; returns how many differed.

    None of our trials may be running meanwhile.
    """
    busy = worked_on(study)
    by_number: dict[str, list[Child]] = defaultdict(list)
    for child in children.all():
        if NUMBER in child.tags:
            by_number[child.tags[NUMBER]].append(child)
    mended = 0
    known = study.user_attrs.get(RUNS, {})
    for trial in study.get_trials(deepcopy=False):
        own = by_number.pop(str(trial.number), [])
        if trial.number in busy:
            continue
        if trial.state not in ENDED:
            mended += _drop(children, own)
            continue
        row = row_of(trial, known)
        kept = next((child for child in own if child.id == row.run_id), own[0] if own else None)
        mended += _drop(children, [child for child in own if child is not kept])
        killed = trial.user_attrs.get(RESULT, {}).get("ended")
        status = killed or STATUS[row.state]
        if kept is not None and kept.status == status and kept.tags.get(STATE) == row.state:
            continue
        run_id = kept.id if kept is not None else children.begin(row.name, child_tags(row.number, tags), _ms(row))
        if run_id != row.run_id:
            _remember(study, trial, run_id)
        write(children, run_id, row, status)
        mended += 1
    for left in by_number.values():
        mended += _drop(children, left)
    return mended


def child_tags(number: int, tags: Mapping[str, str]) -> dict[str, str]:
    """Tags of a child run."""
    return {**tags, "kind": "trial", NUMBER: str(number), STATE: "RUNNING"}


def write(children: Children, run_id: str, row: TrialRow, status: str) -> None:
    """Write all that is known of a trial into its run, and end that."""
    metrics = dict(row.metrics)
    metrics |= {f"time/{name}_s": value for name, value in row.seconds.items()}
    if row.values is not None:
        names = [f"objective/{index}" for index in range(len(row.values))] if len(row.values) > 1 else ["objective"]
        metrics |= dict(zip(names, row.values, strict=True))
    tags = {STATE: row.state, "crucible.feasible": str(row.feasible).lower()}
    if row.reason:
        tags["crucible.reason"] = row.reason
    if row.retry_of is not None:
        tags["crucible.retry_of"] = str(row.retry_of)
    children.end(run_id, status, row.params, metrics, tags)


def _remember(study: Study, trial: FrozenTrial, run_id: str) -> None:
    """A finished trial takes no attributes: those that lost their run are kept beside the study."""
    known = dict(study.user_attrs.get(RUNS, {}))
    known[str(trial.number)] = run_id
    study.set_user_attr(RUNS, known)


def _drop(children: Children, surplus: list[Child]) -> int:
    for child in surplus:
        children.remove(child.id)
    return len(surplus)


def _ms(row: TrialRow) -> int | None:
    return int(row.started.timestamp() * 1000) if row.started else None
