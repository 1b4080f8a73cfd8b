"""Runs under a run, a trial each, written with few requests; with track.py and its fellows the gate to mlflow."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.provenance import process_tags
from harness.record import LONGEST_PARAM, LONGEST_TAG, PER_REQUEST, shortened, spelled
from harness.store import connect, experiment_id

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT = "mlflow.parentRunId"
PER_PAGE = 1000


@dataclass(frozen=True)
class Child:
    """A run under another, as the store has it."""

    id: str
    status: str  # RUNNING, FINISHED, FAILED, KILLED
    tags: Mapping[str, str]
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Children:
    """The runs under one parent, as one process writes them."""

    def __init__(self, parent: str, experiment: str, client: MlflowClient | None = None) -> None:
        """Know the parent.

        Args:
            parent: Its run id.
            experiment: The id of its experiment.
            client: Of the store; by default one of MLFLOW_TRACKING_URI.
        """
        self.parent, self._experiment = parent, experiment
        self._client = client or connect()
        self._process = process_tags()

    @classmethod
    def of(cls, parent: str) -> Children:
        """The children of a run that is there."""
        client = connect()
        return cls(parent, client.get_run(parent).info.experiment_id, client)

    def begin(self, name: str, tags: Mapping[str, str], started_ms: int | None = None) -> str:
        """Open a child; returns its id. One request."""
        from mlflow.tracking.context.registry import resolve_tags

        own = {**tags, **self._process, PARENT: self.parent}
        all_tags = resolve_tags({key: shortened(value, LONGEST_TAG) for key, value in own.items()})
        started = started_ms or time.time_ns() // 1_000_000
        return self._client.create_run(self._experiment, started, all_tags, name).info.run_id

    def end(
        self,
        run_id: str,
        status: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        """Write all of a child and end it: two requests, more only for very many parameters."""
        from mlflow.entities import Metric, Param, RunTag

        now = time.time_ns() // 1_000_000
        values = [Metric(key, float(value), now, 0) for key, value in metrics.items() if math.isfinite(value)]
        settings = [Param(key, shortened(spelled(value), LONGEST_PARAM)) for key, value in params.items()]
        marks = [RunTag(key, shortened(str(value), LONGEST_TAG)) for key, value in tags.items()]
        self._client.log_batch(run_id, values[: 5 * PER_REQUEST], settings[:PER_REQUEST], marks)
        for start in range(PER_REQUEST, len(settings), PER_REQUEST):
            self._client.log_batch(run_id, params=settings[start : start + PER_REQUEST])
        self._client.set_terminated(run_id, status)

    def note(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Add metrics to a run that has ended."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        values = [Metric(key, float(value), now, 0) for key, value in metrics.items() if math.isfinite(value)]
        for start in range(0, len(values), 5 * PER_REQUEST):
            self._client.log_batch(run_id, values[start : start + 5 * PER_REQUEST])

    def all(self) -> list[Child]:
        """Every child that the store has."""
        return _found(self._client, self._experiment, {PARENT: self.parent})

    def remove(self, run_id: str) -> None:
        """Delete a child that should not be there."""
        self._client.delete_run(run_id)


def runs_with(experiment: str, tags: Mapping[str, str]) -> list[Child]:
    """The runs of an experiment that have these tags, the newest first.

    Args:
        experiment: Its name; made if there is none.
        tags: Name -> value.

    Raises:
        TrackingError: The store cannot be used.
    """
    client = connect()
    return _found(client, experiment_id(client, experiment), tags)


def _found(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> list[Child]:
    """Runs by their tags, page by page."""
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    found: list[Child] = []
    token = None
    while True:
        page = client.search_runs([experiment], wanted, max_results=PER_PAGE, page_token=token)
        found += [
            Child(run.info.run_id, run.info.status, run.data.tags, run.data.params, run.data.metrics) for run in page
        ]
        token = page.token
        if not token:
            return found


def tracking_uri() -> str:
    """Where runs are tracked."""
    import mlflow

    return mlflow.get_tracking_uri()


def experiment_of(name: str) -> str:
    """The id of an experiment, made if there is none.

    Raises:
        TrackingError: The store cannot be used.
    """
    return experiment_id(connect(), name)


def point(run_id: str, other: str, name: str) -> None:
    """Say on a run's page that its work went into another one."""
    client = connect()
    client.update_run(run_id, name=name)
    client.set_tag(run_id, "crucible.went_into", other)


def exists(run_id: str) -> bool:
    """Whether the store has a run, not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return connect().get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return False
