"""The tracking store: reachable, and without runs of the dead.

With track.py, record.py and logged_model.py this is the gate to mlflow.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import UserError
from harness.provenance import is_dead

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mlflow import MlflowClient
    from mlflow.entities import Run as Record

WAIT_S = 15  # the longest a run waits for a tracking server before it gives up
_BRIEF = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


class TrackingError(UserError):
    """The tracking store cannot be used as asked."""


def connect() -> MlflowClient:
    """A client of MLFLOW_TRACKING_URI, or of MLflow's default store in the working directory.

    Raises:
        TrackingError: The server does not answer within `WAIT_S` seconds, or the store cannot be opened.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = mlflow.get_tracking_uri()
    local = uri.startswith(("sqlite:", "file:")) or "://" not in uri
    try:
        with _quiet("mlflow.store.db.utils"):
            if not local:
                with briefly():
                    _within(WAIT_S, lambda: _probe(uri))
            client = mlflow.MlflowClient()
            client.search_experiments(max_results=1)  # opens the store; at first use this creates its tables
    except (MlflowException, OSError, TimeoutError, ImportError) as error:
        raise TrackingError(_unusable(uri, error)) from error
    return client


def _unusable(uri: str, error: BaseException) -> str:
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 300 else reason[:300] + " ..."
    return (
        f"the tracking store {_without_password(uri)} cannot be used, nothing was started: {reason} "
        "Check MLFLOW_TRACKING_URI, start the server, or unset the variable to use the working directory."
    )


def _without_password(uri: str) -> str:
    head, at, tail = uri.rpartition("@")
    if not at or "://" not in head:
        return uri
    scheme, _, user = head.partition("://")
    return f"{scheme}://{user.partition(':')[0]}@{tail}"


def _probe(uri: str) -> None:
    """One request, or one database connection, without the patience that is right in the middle of a run."""
    if uri.startswith(("http:", "https:")):
        import mlflow

        mlflow.MlflowClient().search_experiments(max_results=1)
    elif "://" in uri:
        from sqlalchemy import create_engine
        from sqlalchemy.exc import ArgumentError, SQLAlchemyError

        try:
            engine = create_engine(uri)
        except ArgumentError:
            return  # no database: MLflow's own message for what it does not know is the better one
        try:
            engine.connect().close()
        except SQLAlchemyError as error:
            raise OSError(str(error.__cause__ or error)) from error
        finally:
            engine.dispose()


def _within(seconds: float, work: Callable[[], Any]) -> None:
    """Run `work` in a thread that the process need not wait for."""
    from mlflow.exceptions import MlflowException

    failure: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except (MlflowException, OSError, ImportError) as error:
            failure.append(error)

    thread = threading.Thread(target=guarded, daemon=True, name="crucible-probe")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds} seconds.")
    if failure:
        raise failure[0]


def briefly() -> AbstractContextManager[None]:
    """Have MLflow give up on a silent server within seconds instead of minutes."""
    return environment(_BRIEF)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the body: MLflow reads its settings there at each request."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Keep the news of table creation off the terminal; warnings still show."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def experiment_id(client: MlflowClient, name: str) -> str:
    """The id of an experiment, created if there is none of that name.

    Raises:
        TrackingError: The name belongs to a deleted experiment, or MLflow refuses it.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    try:
        if found is None:
            return client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"})
    except MlflowException as error:
        found = client.get_experiment_by_name(name)  # another process was quicker
        if found is None:
            raise TrackingError(f"tracking.experiment={name!r} cannot be created: {error}") from error
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name!r} was deleted; restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}` or set tracking.experiment to another name"
        )
    return found.experiment_id


def bury_the_dead(client: MlflowClient, experiment: str) -> list[str]:
    """End the runs whose process was killed without a chance to end them, and remove models they left half-written.

    Returns:
        One line for each run found, for the terminal.
    """
    running = client.search_runs([experiment], "attributes.status = 'RUNNING'", max_results=1000)
    return [_bury(client, run) for run in running if "crucible.pid" in run.data.tags and is_dead(run.data.tags)]


def _bury(client: MlflowClient, run: Record) -> str:
    removed = [place for model in _unfinished(client, run) if (place := _remove_half_written(client, model))]
    scratch = scratch_directory(run.info.run_id)
    if scratch.exists():
        shutil.rmtree(scratch, ignore_errors=True)
        removed.append(str(scratch))
    client.set_terminated(run.info.run_id, status="KILLED")
    left = f"; removed its half-written model {', '.join(removed)}" if removed else ""
    return (
        f"found run {run.info.run_name} ({run.info.run_id}) of process {run.data.tags['crucible.pid']}, "
        f"which no longer exists: marked KILLED{left}"
    )


def _unfinished(client: MlflowClient, run: Record) -> list[Any]:
    outputs = run.outputs.model_outputs if run.outputs else []
    models = [client.get_logged_model(output.model_id) for output in outputs]
    return [model for model in models if model.status == "PENDING"]


def _remove_half_written(client: MlflowClient, model: Any) -> str | None:
    """Finish a model whose files are complete; else mark it failed and remove what there is of it."""
    place = local_directory(model.artifact_location)
    if place is not None and (place / "MLmodel").exists():  # it is renamed into place only when complete
        client.finalize_logged_model(model.model_id, "READY")
        return None
    client.finalize_logged_model(model.model_id, "FAILED")
    if place is None or not place.parent.exists():
        return None
    shutil.rmtree(place.parent, ignore_errors=True)
    return str(place.parent)


def local_directory(location: str) -> Path | None:
    """An artifact location as a path of this machine, or None where it is another's."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    return Path(local_file_uri_to_path(location)) if is_local_uri(location) else None


def scratch_directory(run_id: str) -> Path:
    """Where a run writes its model before an upload; named by the run, so that a later one can find it."""
    return Path(tempfile.gettempdir()) / f"crucible-{run_id}"
