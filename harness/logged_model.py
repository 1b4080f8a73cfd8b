"""A run's merged model as an MLflow LoggedModel: files written once, complete before they have their name.

With track.py, store.py and record.py this is the gate to mlflow.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.provenance import version
from harness.store import TrackingError, local_directory, scratch_directory

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import Model, ModelSignature

LOADER = "harness.serve"
_REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "pandas", "pillow")
# What a pipeline of `mlflow.transformers` is made of, by the model's class in config.json.
_PIPELINES = {
    "CLIPModel": {
        "task": "zero-shot-image-classification",
        "instance_type": "ZeroShotImageClassificationPipeline",
        "tokenizer_type": "CLIPTokenizer",
        "image_processor_type": "CLIPImageProcessor",
    }
}
_COMPONENT_FILES = {
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
    "image_processor": ("preprocessor_config.json", "processor_config.json"),
}


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
        metadata: JSON-compatible facts kept in the MLmodel file; `tasks` ({name: {labels, templates}}) lets
            `predict` take a task's name instead of a list of classes.
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
        _describe(partial, model, run_id, metadata)
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
    from pools.write import sync

    sync(partial)
    os.rename(partial, final)
    sync(final.parent)


def _describe(directory: Path, model: LoggedModel, run_id: str, metadata: Mapping[str, Any]) -> None:
    """Add what makes a directory an MLflow model: MLmodel and requirements.txt."""
    from mlflow.models import Model

    from pools.write import sync

    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    (directory / "requirements.txt").write_text(_requirements(), encoding="utf-8")
    spec = Model(
        artifact_path=model.artifact_location,
        run_id=run_id,
        model_uuid=model.model_id,
        model_id=model.model_id,
        metadata={"tasks": {}, **metadata, "code": f"{LOADER} (crucible must be importable)"},
        model_size_bytes=size,
        signature=_signature(metadata),
    )
    # As mlflow.pyfunc.add_to_model does, whose import costs a second and a warning on the terminal.
    spec.add_flavor("python_function", loader_module=LOADER, python_version=platform.python_version())
    _add_transformers(spec, directory)
    spec.save(directory / "MLmodel")
    for name in ("requirements.txt", "MLmodel"):
        sync(directory / name)


def _add_transformers(spec: Model, directory: Path) -> None:
    """The flavor of `mlflow.transformers`, on the very same weights; it wants the small component files apart."""
    config = directory / "config.json"
    kinds = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.exists() else None
    if not kinds or kinds[0] not in _PIPELINES:
        return
    facts = dict(_PIPELINES[kinds[0]])
    facts["image_processor_type"] = _without_torchvision(facts["image_processor_type"])
    for component, files in _COMPONENT_FILES.items():
        (directory / "components" / component).mkdir(parents=True)
        for name in files:
            if (directory / name).exists():
                shutil.copy(directory / name, directory / "components" / component / name)
    spec.add_flavor(
        "transformers",
        framework="pt",
        pipeline_model_type=kinds[0],
        model_binary=".",
        components=list(_COMPONENT_FILES),
        **facts,
    )


def _without_torchvision(name: str) -> str:
    """The variant of an image processor that needs no torchvision, where transformers has one."""
    import transformers

    return f"{name}Pil" if hasattr(transformers, f"{name}Pil") else name


def _requirements() -> str:
    """The versions the model was written with; crucible itself is on no index and stays the user's to install."""
    found = {name: version(name) for name in _REQUIREMENTS}
    lines = [f"{name}=={number.partition('+')[0]}" for name, number in found.items() if number]
    return "\n".join(["# besides these: crucible itself, whose harness.serve loads this model", *lines, ""])


def _signature(metadata: Mapping[str, Any]) -> ModelSignature:
    """Images in, labels out; the classes are parameters, as the model is zero-shot."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Array

    first = next(iter(metadata.get("tasks") or {}), "")
    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), "image")]),
        outputs=Schema([ColSpec("string", "label"), ColSpec(Array(DataType.double), "probabilities")]),
        params=ParamSchema(
            [
                ParamSpec("task", "string", default=first),
                ParamSpec("classes", "string", default=[], shape=(-1,)),
                ParamSpec("templates", "string", default=[], shape=(-1,)),
            ]
        ),
    )


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
