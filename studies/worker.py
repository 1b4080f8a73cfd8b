"""What a worker does: take a ticket, ask Optuna, merge and score, tell, record; again until there are no tickets."""

from __future__ import annotations

import math
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import Trial, TrialState

from harness.config import ConfigError, RunConfig
from harness.nested import Children
from harness.provenance import process_tags
from harness.trials import Resident, Step
from methods.catalogue import find
from studies.agree import on_stale
from studies.finished import OWNER, RESULT, row_of, title
from studies.objectives import Bound, Objective
from studies.pruning import Onlooker, Pruned
from studies.recorder import Recorder
from studies.samplers import pruner_of, sampler_of
from studies.settings import StudySettings
from studies.space import Space
from studies.storage import open_storage

LONGEST_REASON = 1000
EXHAUSTED = "exhausted"  # among what a worker returns: whether there is nothing left to try


@dataclass(frozen=True)
class Errand:
    """All that a worker is told; it crosses to another process."""

    storage: str
    study: str
    settings: StudySettings
    space: Space
    objectives: tuple[Objective, ...]
    bounds: tuple[Bound, ...]
    parent: str  # MLflow run
    experiment: str  # its id
    seed: int
    tags: Mapping[str, str]  # of every child run
    worker: int = 0
    device: int | None = None
    processes: int = 1
    done: int = 0  # trials there were when it began


class Tickets(Protocol):
    """Leave to begin a trial, shared by all workers."""

    def take(self, worker: int) -> bool:
        """Whether one more trial may begin."""
        ...

    def begun(self, worker: int, number: int) -> None:
        """Which trial it is."""
        ...

    def ended(self, worker: int) -> None:
        """The trial has ended, in whatever state."""
        ...


@dataclass
class _Clock:
    """Seconds by what they went into."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("optuna", "mlflow"), 0.0))

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - started


def work(errand: Errand, tickets: Tickets, after: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Do trials until there are no tickets; returns seconds by what they went into.

    Args:
        errand: What to do.
        tickets: Leave to begin trials.
        after: Called after each.
    """
    settings = errand.settings
    storage = open_storage(errand.storage, settings.heartbeat_s, on_stale)
    sampler = sampler_of(settings, errand.space, errand.seed, errand.worker, errand.done)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage is supposed")  # they are given by `_alive`
        study = optuna.load_study(study_name=errand.study, storage=storage, sampler=sampler, pruner=pruner_of(settings))
        config = next(iter(errand.space.configs.values()))
        wanted = [objective.metric for objective in errand.objectives] + [bound.metric for bound in errand.bounds]
        resident = Resident(
            config,
            step_rows=settings.step_rows if settings.pruner != "none" else None,
            search_on_test=settings.search_on_test,
            device=errand.device,
            processes=errand.processes,
            normalized=any(metric.endswith("/normalized") for metric in wanted),
        )
        recorder = Recorder(Children(errand.parent, errand.experiment), errand.tags)
        worker = _Worker(errand, study, storage, resident, recorder)
        # Samplers that walk through all there is say when they are through, as they do to `Study.optimize`.
        study._thread_local.in_optimize_loop, study._stop_flag = True, False
        with recorder.closing():
            while not study._stop_flag and tickets.take(errand.worker):
                worker.trial(tickets)
                tickets.ended(errand.worker)
                after()
    return worker.total | {"mlflow_beside": recorder.seconds, EXHAUSTED: float(study._stop_flag)}


class _Worker:
    def __init__(
        self, errand: Errand, study: optuna.Study, storage: BaseStorage, resident: Resident, recorder: Recorder
    ) -> None:
        self._errand, self._study, self._storage = errand, study, storage
        self._resident, self._recorder = resident, recorder
        self._process = process_tags()
        self.total = dict.fromkeys(("merge", "evaluate", "optuna", "mlflow", "total"), 0.0)

    def trial(self, tickets: Tickets) -> None:
        """One trial, from asking to its record."""
        started, clock = time.perf_counter(), _Clock()
        with clock.running("optuna"):
            trial = self._study.ask()
            tickets.begun(self._errand.worker, trial.number)
            params = self._errand.space.suggest(trial)
        with clock.running("mlflow"):
            self._recorder.begin(trial.number, title(params))
        with clock.running("optuna"):
            trial.set_user_attr(OWNER, self._process)
        with _alive(self._storage, trial._trial_id):
            state, result, values = self._scored(trial, params, clock)
        with clock.running("mlflow"):
            result["run_id"] = self._recorder.run_id()
        result["seconds"] |= clock.seconds | {"total": time.perf_counter() - started}
        with clock.running("optuna"):
            trial.set_user_attr(RESULT, result)
            frozen = self._study.tell(trial, values, state, skip_if_finished=True)
        with clock.running("mlflow"):
            self._recorder.end(row_of(frozen), "FAILED" if state is TrialState.FAIL else "FINISHED")
        result["seconds"] |= clock.seconds | {"total": time.perf_counter() - started}
        for what in self.total:
            self.total[what] += result["seconds"].get(what, 0.0)

    def _scored(
        self, trial: Trial, params: Mapping[str, Any], clock: _Clock
    ) -> tuple[TrialState, dict[str, Any], list[float] | None]:
        """State, what is kept of the trial, values of the objectives."""
        result: dict[str, Any] = {"metrics": {}, "seconds": {}, "steps": 0}
        finals: list[Mapping[str, float]] = []
        last: Step | None = None
        onlooker: Onlooker | None = None
        try:
            config = self._errand.space.config(params)
            seeds = self._seeds(config)
            with clock.running("optuna"):
                onlooker = self._onlooker(trial, len(seeds))
            for repeat, seed in enumerate(seeds):
                for step in self._resident.score(config, seed):
                    last = step
                    result["steps"] += 1
                    if onlooker is not None:
                        with clock.running("optuna"):
                            onlooker.see(repeat, step, finals)
                assert last is not None
                finals.append(last.metrics)
            result |= self._summed(finals)
            values = [result["metrics"][objective.metric] for objective in self._errand.objectives]
            broken = [
                f"{objective.metric} is {value}"
                for objective, value in zip(self._errand.objectives, values, strict=True)
                if not math.isfinite(value)
            ]
            if broken:
                return TrialState.FAIL, result | {"reason": "; ".join(broken)}, None
            with clock.running("optuna"):
                for bound in self._errand.bounds:
                    trial.set_constraint(bound.name, bound.excess(result["metrics"]))
        except Pruned:
            assert last is not None
            result |= self._summed([*finals, last.metrics])
            # Optuna gives a pruned trial the value that it saw last, which may be that of one piece.
            so_far = {"values": [result["metrics"][self._errand.objectives[0].metric]]}
            return TrialState.PRUNED, result | so_far, None
        except ConfigError as error:
            return TrialState.FAIL, result | {"reason": _short("; ".join(error.faults))}, None
        except Exception as error:
            return TrialState.FAIL, result | {"reason": _short(f"{type(error).__name__}: {error}")}, None
        finally:
            if onlooker is not None:
                with clock.running("optuna"):
                    onlooker.keep(self._storage)
        return TrialState.COMPLETE, result, values

    def _onlooker(self, trial: Trial, repeats: int) -> Onlooker | None:
        """The pruner at a trial; None where there is none."""
        pruner = self._errand.settings.pruner
        if pruner == "none":
            return None
        objective = self._errand.objectives[0]
        return Onlooker(self._study, trial, objective, pieces=pruner == "wilcoxon", repeats=repeats)

    def _seeds(self, config: RunConfig) -> range:
        """Seeds of a trial: one where nothing depends on them."""
        row = find(config.method_name)
        return range(config.seed, config.seed + (self._errand.settings.repeats if row.random or row.loss else 1))

    def _summed(self, finals: list[Mapping[str, float]]) -> dict[str, Any]:
        """Means over seeds, and the objectives' spread where there are several."""
        metrics = {name: statistics.fmean(each[name] for each in finals) for name in finals[-1] if _all(finals, name)}
        if len(finals) > 1:
            for objective in self._errand.objectives:
                if _all(finals, objective.metric):
                    values = [each[objective.metric] for each in finals]
                    metrics[f"spread/{objective.metric}"] = statistics.stdev(values)
        seconds = {
            "merge": math.fsum(each["time/merge_s"] for each in finals),
            "evaluate": math.fsum(each["time/evaluate_s"] for each in finals),
        }
        return {"metrics": metrics, "seconds": seconds}


def _all(finals: list[Mapping[str, float]], name: str) -> bool:
    return all(name in each for each in finals)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " ..."


@contextmanager
def _alive(storage: BaseStorage, trial_id: int) -> Iterator[None]:
    """Give signs of life of a trial while the body runs, where the storage keeps them."""
    if not isinstance(storage, RDBStorage):
        yield
        return
    done = threading.Event()

    def beat() -> None:
        while True:
            storage.record_heartbeat(trial_id)
            if done.wait(storage.get_heartbeat_interval()):
                return

    thread = threading.Thread(target=beat, daemon=True, name="crucible-heartbeat")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
