"""What makes a model directory an MLflow model: MLmodel with its flavors and signature, and requirements.txt."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.provenance import version
from harness.serve_language import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.models import Model, ModelSignature

LOADER = "harness.serve"
_REQUIREMENTS = {
    "clip": ("mlflow", "torch", "transformers", "safetensors", "pandas", "pillow"),
    "state_dict": ("mlflow", "torch", "safetensors"),
}
_OF_LANGUAGE = ("mlflow", "torch", "transformers", "safetensors", "pandas")
# What a pipeline of `mlflow.transformers` is made of, by family; for seq2seq transformers 5 has no pipeline.
_PIPELINES = {
    "clip": {
        "task": "zero-shot-image-classification",
        "instance_type": "ZeroShotImageClassificationPipeline",
        "pipeline_model_type": "CLIPModel",
        "tokenizer_type": "CLIPTokenizer",
        "image_processor_type": "CLIPImageProcessor",
    },
    "causal_lm": {
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": "AutoModelForCausalLM",
        "tokenizer_type": "AutoTokenizer",
    },
    "sequence_classification": {
        "task": "text-classification",
        "instance_type": "TextClassificationPipeline",
        "pipeline_model_type": "AutoModelForSequenceClassification",
        "tokenizer_type": "AutoTokenizer",
    },
}
_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def describe(directory: Path, model: LoggedModel, run_id: str, metadata: Mapping[str, Any]) -> None:
    """Add the files that MLflow looks for; what was written is complete but for them.

    Args:
        directory: A model directory of the family.
        model: What it becomes.
        run_id: The run it comes from.
        metadata: As `harness.logged_model.log_model` takes it.
    """
    from mlflow.models import Model

    from pools.partial import sync

    family = metadata.get("family", "clip")
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    (directory / "requirements.txt").write_text(_requirements(directory, family), encoding="utf-8")
    spec = Model(
        artifact_path=model.artifact_location,
        run_id=run_id,
        model_uuid=model.model_id,
        model_id=model.model_id,
        metadata={"tasks": {}, **metadata, "code": f"{LOADER} (crucible must be importable)"},
        model_size_bytes=size,
        signature=_signature(family, metadata),
    )
    # As mlflow.pyfunc.add_to_model does, whose import costs a second and a warning on the terminal.
    spec.add_flavor("python_function", loader_module=LOADER, python_version=platform.python_version())
    if _has_pipeline(directory, family, metadata):
        _add_transformers(spec, directory, family)
    spec.save(directory / "MLmodel")
    for name in ("requirements.txt", "MLmodel"):
        sync(directory / name)


def _has_pipeline(directory: Path, family: str, metadata: Mapping[str, Any]) -> bool:
    """Whether transformers makes a pipeline of the directory as it is, running no code of the model's own."""
    from pools.language_config import read_config
    from pools.tokenizer_files import TokenizerFiles

    config = read_config(directory)
    if family not in _PIPELINES or config is None:
        return False  # a built module has no configuration at its top
    if family == "clip":
        return config.get("architectures") == ["CLIPModel"]
    foreign = "auto_map" in config and metadata.get("trust_remote_code")
    return TokenizerFiles.find(directory) is not None and not foreign


def _add_transformers(spec: Model, directory: Path, family: str) -> None:
    """The flavor of `mlflow.transformers`, on the very same weights; it wants the small component files apart."""
    from pools.tokenizer_files import ALL

    facts = dict(_PIPELINES[family])
    components = {"tokenizer": (*ALL, "config.json")}  # by which AutoTokenizer knows the tokenizer's class
    if "image_processor_type" in facts:
        facts["image_processor_type"] = _without_torchvision(facts["image_processor_type"])
        components["image_processor"] = _IMAGE_PROCESSOR_FILES
    for component, files in components.items():
        (directory / "components" / component).mkdir(parents=True)
        for name in files:
            if (directory / name).exists():
                shutil.copy(directory / name, directory / "components" / component / name)
    spec.add_flavor("transformers", framework="pt", model_binary=".", components=list(components), **facts)


def _without_torchvision(name: str) -> str:
    """The variant of an image processor that needs no torchvision, where transformers has one."""
    import transformers

    return f"{name}Pil" if hasattr(transformers, f"{name}Pil") else name


def _requirements(directory: Path, family: str) -> str:
    """The versions the model was written with; crucible itself is on no index and stays the user's to install."""
    wanted = _REQUIREMENTS.get(family, _OF_LANGUAGE)
    if not (directory / "tokenizer.json").exists() and list(directory.glob("*.model")):
        wanted = (*wanted, "sentencepiece", "protobuf")
    found = {name: version(name) for name in wanted}
    lines = [f"{name}=={number.partition('+')[0]}" for name, number in found.items() if number]
    return "\n".join(["# besides these: crucible itself, whose harness.serve loads this model", *lines, ""])


def _signature(family: str, metadata: Mapping[str, Any]) -> ModelSignature | None:
    """What goes in and comes out; None for a state dict, which answers nothing."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Array

    labels = Schema([ColSpec("string", "label"), ColSpec(Array(DataType.double), "probabilities")])
    expert = [ParamSpec("expert", "string", default="")] if metadata.get("experts") else []  # which of those it holds
    expert += [ParamSpec("preference", "double", default=[], shape=(-1,))] if metadata.get("preference") else []
    if family == "clip":  # zero-shot: the classes are parameters
        asked = [
            ParamSpec("task", "string", default=next(iter(metadata.get("tasks") or {}), "")),
            ParamSpec("classes", "string", default=[], shape=(-1,)),
            ParamSpec("templates", "string", default=[], shape=(-1,)),
            *expert,
        ]
        return ModelSignature(Schema([ColSpec(AnyType(), "image")]), labels, ParamSchema(asked))
    if family == "sequence_classification":
        return ModelSignature(Schema([ColSpec("string", "text")]), labels, *([ParamSchema(expert)] if expert else []))
    if family == "state_dict":
        return None
    asked = [ParamSpec("max_new_tokens", "long", default=MAX_NEW_TOKENS), ParamSpec("stop", "string", default=None)]
    asked += expert
    return ModelSignature(
        Schema([ColSpec("string", "prompt")]), Schema([ColSpec("string", "text")]), ParamSchema(asked)
    )
