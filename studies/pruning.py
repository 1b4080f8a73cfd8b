"""A pruner that looks on while a trial is scored, from memory: storage is read once before and written once after."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Container, Mapping, Sequence
from typing import Any

from optuna import Study
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from harness.trials import Step
from studies.objectives import Objective
from studies.storage import write_steps


class Pruned(Exception):  # noqa: N818
    """The pruner has seen enough."""


class Onlooker:
    """The study's pruner at one trial."""

    def __init__(self, study: Study, trial: Trial, objective: Objective, *, pieces: bool, repeats: int) -> None:
        """Read the study's trials.

        Args:
            study: With its pruner.
            trial: The one that is looked at.
            objective: What is reported.
            pieces: Whether each piece of the data counts alone, as Wilcoxon's test pairs them; else all so far.
            repeats: Seeds of the trial.
        """
        self._trial_id, self._objective, self._pieces, self._repeats = trial._trial_id, objective, pieces, repeats
        trials = study.get_trials(deepcopy=False)
        own = copy.copy(next(known for known in trials if known._trial_id == self._trial_id))
        own.intermediate_values, own.system_attrs = {}, dict(own.system_attrs)
        self._own, self._pruner = own, study.pruner
        self._study = copy.copy(study)
        self._study._storage = _Held(study._storage, trials, own)  # type: ignore[assignment]

    def see(self, repeat: int, step: Step, finals: Sequence[Mapping[str, float]]) -> None:
        """Look at one more piece.

        Args:
            repeat: Which of the trial's seeds.
            step: The piece.
            finals: Metrics of the seeds before.

        Raises:
            Pruned: The pruner has seen enough.
        """
        if self._pieces:
            value = _of_piece(self._objective, step)
        else:
            known = [metrics[self._objective.metric] for metrics in finals]
            own = step.metrics.get(self._objective.metric)
            value = statistics.fmean([*known, own]) if own is not None else None
        if value is None:
            return
        self._own.intermediate_values[repeat * step.total + step.done] = value  # pieces come in one order
        last = step.done == step.total and repeat + 1 == self._repeats
        if not last and self._pruner.prune(self._study, self._own):
            raise Pruned

    def keep(self, storage: BaseStorage) -> None:
        """Write what was seen into the storage."""
        write_steps(storage, self._trial_id, self._own.intermediate_values)


class _Held:
    """A storage as it was when a trial began, of which pruners ask trials; what they note goes on to the real one."""

    def __init__(self, storage: BaseStorage, trials: list[FrozenTrial], own: FrozenTrial) -> None:
        self._storage, self._own = storage, own
        self._trials = [own if trial._trial_id == own._trial_id else trial for trial in trials]
        self._best: FrozenTrial | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        found = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        if self._best is None:
            ended = [trial for trial in self._trials if trial.state is TrialState.COMPLETE]
            if not ended:
                raise ValueError("No trials are completed yet.")
            rising = self._storage.get_study_directions(study_id)[0] is StudyDirection.MAXIMIZE
            self._best = copy.copy((max if rising else min)(ended, key=lambda trial: trial.value or 0.0))
            self._best.user_attrs = {}  # Optuna copies it at each look
        return self._best

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._own.system_attrs[key] = value
        self._storage.set_trial_system_attr(trial_id, key, value)


def _of_piece(objective: Objective, step: Step) -> float | None:
    """What a piece alone says of an objective; None where it says nothing."""
    head, _, what = objective.metric.partition("/")
    if head not in ("average", step.piece.task):
        return None
    if what == "loss":
        return step.piece.loss
    return step.piece.value if what == step.piece.metric else None
