"""The life of a run in MLflow: opened, and always ended.

With store.py, record.py, logged_model.py and mlmodel.py this is the gate to mlflow; nothing else imports it (serve.py
is what a logged model names as its loader).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.logged_model import ModelReference, local_path
from harness.provenance import git_tags, process_tags, version_tags
from harness.record import DataInput, Run, recorded
from harness.store import (
    TrackingError,
    briefly,
    bury_the_dead,
    connect,
    environment,
    experiment_id,
    local_directory,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mlflow import MlflowClient

__all__ = ["DataInput", "ModelReference", "Run", "Terminated", "TrackingError", "config_of", "local_path", "open_run"]

CONFIG = "config.yaml"


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: what Ctrl-C is, from a scheduler instead of a keyboard."""


@contextmanager
def open_run(
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    *,
    config: str | None = None,
    active: bool = True,
    parent: str | None = None,
) -> Iterator[Run]:
    """A run for the body's length: FINISHED after it, FAILED when it raises, KILLED by Ctrl-C or SIGTERM.

    Started by `mlflow run`, the run it opened is taken over: its name becomes `name`, its experiment stays.

    Args:
        experiment: Name of the experiment; created if there is none.
        name: What the run is, for people.
        tags: Tags of the run; versions, git commit and process are added.
        params: Flat parameters; keys the run already holds (from `mlflow run -P`) keep their value.
        config: The composed configuration as YAML, kept as an artifact.
        active: Whether to record at all: true on rank zero alone.
        parent: Id of the run this one is nested under.

    Raises:
        TrackingError: The store cannot be used; said before the body starts.
    """
    if not active:
        yield Run()
        return
    about = {**tags, **({"mlflow.parentRunId": parent} if parent else {})}
    about.update({**version_tags(), **git_tags(), **process_tags()})
    with termination_raises():
        client = connect()
        run_id = _start(client, experiment, name, about)
        run = recorded(client, run_id, about)
        with _ended(client, run_id, run):
            run.tags(about)
            run.params(params)
            if config is not None:
                run.text(config, CONFIG)
            yield run
            run.flush()


def _start(client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str]) -> str:
    """Open a run, or take over the one `mlflow run` has opened for this process."""
    from mlflow.tracking.context.registry import resolve_tags

    taken = os.environ.pop("MLFLOW_RUN_ID", None)  # once: a second run of this process is its own
    if taken is None:
        where = experiment_id(client, experiment)
        _report(bury_the_dead(client, where))
        all_tags = resolve_tags({**tags, "mlflow.runName": name})
        return client.create_run(where, run_name=name, tags=all_tags).info.run_id
    _report(bury_the_dead(client, client.get_run(taken).info.experiment_id))
    client.update_run(taken, status="RUNNING", name=name)
    return taken


def _report(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"crucible: {line}", file=sys.stderr)


@contextmanager
def _ended(client: MlflowClient, run_id: str, run: Run) -> Iterator[None]:
    """Give the run its final status, whatever happens in the body."""
    try:
        yield
    except BaseException as error:
        with _undisturbed(), briefly():
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            try:
                run.flush()
                if status == "FAILED":
                    run.text(traceback.format_exc(), "traceback.txt")
            finally:
                client.set_terminated(run_id, status)
        raise
    with _undisturbed():
        client.set_terminated(run_id, "FINISHED")


@contextmanager
def termination_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception; only the main thread may, elsewhere signals stay as they are."""

    def terminate(number: int, frame: object) -> None:
        raise Terminated("terminated by SIGTERM")

    with _handling({signal.SIGTERM: terminate}):
        yield


def _undisturbed() -> AbstractContextManager[None]:
    """The few requests that end a run are not interrupted by a second Ctrl-C."""
    return _handling({signal.SIGTERM: signal.SIG_IGN, signal.SIGINT: signal.SIG_IGN})


@contextmanager
def _handling(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def config_of(run_id: str) -> str:
    """The composed configuration of an earlier run, as YAML.

    Raises:
        TrackingError: There is no such run, or it holds no configuration.
    """
    from mlflow.exceptions import MlflowException

    client = connect()
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise TrackingError(f"{client.tracking_uri} holds no run {run_id!r}; `mlflow ui` lists them") from error
    place = local_directory(str(run.info.artifact_uri))
    try:
        with environment({"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}):
            file = place / CONFIG if place else Path(client.download_artifacts(run_id, CONFIG))
        return file.read_text(encoding="utf-8")
    except (MlflowException, OSError) as error:
        raise TrackingError(f"run {run_id} holds no {CONFIG}: only runs that crucible made can be repeated") from error
