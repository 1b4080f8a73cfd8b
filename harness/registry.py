"""A logged model under a name and an alias of MLflow's model registry; one of the gates to mlflow."""

from __future__ import annotations

from collections.abc import Mapping

from harness.config import UserError
from harness.store import connect


def register(model_uri: str, name: str, alias: str, tags: Mapping[str, str]) -> str:
    """Register a model as the next version of a name and point the alias at it; returns `models:/name@alias`.

    Raises:
        UserError: The registry refuses it.
    """
    from mlflow.exceptions import MlflowException

    client = connect()
    try:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        model_id = model_uri.removeprefix("models:/")
        model = client.get_logged_model(model_id)
        version = client.create_model_version(
            name, model.artifact_location, run_id=model.source_run_id, tags=dict(tags), model_id=model_id
        )
        client.set_registered_model_alias(name, alias, version.version)
    except MlflowException as error:
        raise UserError(f"study.register={name}: the model registry refuses it: {error}") from error
    return f"models:/{name}@{alias}"
