"""A run's merged model as an MLflow LoggedModel: files written once, complete before they have their name.

With track.py, store.py, record.py and mlmodel.py this is the gate to mlflow.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.mlmodel import describe
from harness.store import TrackingError, local_directory, scratch_directory

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel


@dataclass(frozen=True)
class ModelReference:
    """A logged model: `models:/<id>` names it wherever MLflow takes a model."""

    id: str
    uri: str
    directory: Path | None  # its files, where the artifact store is a directory of this machine


def log_model(
    client: MlflowClient,
    run_id: str,
    write: Callable[[Path], Any],
    *,
    name: str,
    metadata: Mapping[str, Any],
    tags: Mapping[str, str],
) -> ModelReference:
    """Have `write` fill a directory and make it a model of the run.

    In a local artifact store `write` fills a sibling of the final directory, which is renamed last; for a remote one
    it fills a temporary directory, which is uploaded and removed. If anything fails the model ends FAILED, and without
    files.

    Args:
        client: Where the run is.
        run_id: The run the model comes from.
        write: Writes a complete model directory at the path it is given, which does not exist yet.
        name: The model's name in the Models tab and in `runs:/<run_id>/<name>`.
        metadata: JSON-compatible facts kept in the MLmodel file; `family`, the pool's (without it: clip), says how
            the model is opened and asked; `tasks` ({name: {labels, templates}}) lets `predict` of a CLIP take a
            task's name instead of a list of classes.
        tags: Tags of the model.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.tracking.context.registry import resolve_tags

    run = client.get_run(run_id)
    model = client.create_logged_model(
        run.info.experiment_id,
        name=name,
        source_run_id=run_id,
        tags=resolve_tags(dict(tags)),
        params=run.data.params,
        model_type="merged",
    )
    final = local_directory(model.artifact_location)
    with _finalized(client, model, run_id, final):
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        partial = (final.parent if final else scratch_directory(run_id)) / "partial"
        partial.parent.mkdir(parents=True)
        write(partial)
        describe(partial, model, run_id, metadata)
        if final:
            _publish(partial, final)
        else:
            client.log_model_artifacts(model.model_id, str(partial))
    return ModelReference(model.model_id, f"models:/{model.model_id}", final)


@contextmanager
def _finalized(client: MlflowClient, model: LoggedModel, run_id: str, final: Path | None) -> Iterator[None]:
    """READY after the body; FAILED, and no files, when it raises (Ctrl-C included)."""
    try:
        yield
    except BaseException:
        if final:
            shutil.rmtree(final.parent, ignore_errors=True)
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    finally:
        shutil.rmtree(scratch_directory(run_id), ignore_errors=True)
    client.finalize_logged_model(model.model_id, "READY")


def _publish(partial: Path, final: Path) -> None:
    """Give the complete directory its name, on the disk too."""
    from pools.partial import sync

    sync(partial)
    os.rename(partial, final)
    sync(final.parent)


def local_path(uri: str) -> Path:
    """The directory of a model named by `models:/<id>`, `models:/<name>/<version>` or `runs:/<run_id>/<name>`.

    Files in a local artifact store are used where they lie; others are downloaded until the process ends.

    Raises:
        TrackingError: There is no such model, or it is not complete.
    """
    import mlflow
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    try:
        model = _find(client, uri)
        if model is not None and model.status != "READY":
            raise TrackingError(f"{uri} is {model.status}: its files are not complete; name another model")
        place = local_directory(model.artifact_location) if model is not None else None
        return place or Path(download_artifacts(artifact_uri=uri, dst_path=_until_exit()))
    except (MlflowException, OSError) as error:
        raise TrackingError(f"{uri} cannot be opened in {mlflow.get_tracking_uri()}: {error}") from error


def _until_exit() -> str:
    """A directory that is removed when the process ends."""
    directory = tempfile.mkdtemp(prefix="crucible-download-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _find(client: MlflowClient, uri: str) -> LoggedModel | None:
    """The logged model of a URI; None for what is something else (a registered model, a run's plain artifacts)."""
    kind, _, rest = uri.partition(":/")
    first, _, name = rest.strip("/").partition("/")
    if kind == "models" and not name and "@" not in first:
        return client.get_logged_model(first)
    if kind == "runs":
        outputs = client.get_run(first).outputs
        models = [client.get_logged_model(output.model_id) for output in (outputs.model_outputs if outputs else [])]
        return next((model for model in models if model.name == name), None)
    return None
