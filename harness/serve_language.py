"""What a logged language model answers through MLflow: prompts in and texts out, or texts in and labels out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from harness.rebuild import open_directory, prefer

if TYPE_CHECKING:
    import pandas

MAX_NEW_TOKENS = 32  # of a continuation, unless it is asked for otherwise
BATCH = 32  # texts classified at a time


class Served(Protocol):
    """What MLflow asks of a model."""

    def predict(self, model_input: pandas.DataFrame, params: Mapping[str, Any] | None = None) -> pandas.DataFrame:
        """Answer a table, a row for each of its rows."""
        ...


def open_served(directory: Path, family: str, trust_remote_code: bool = False) -> Served:
    """A model directory as MLflow asks it.

    Args:
        directory: What a pool of language models or state dicts has written.
        family: The pool's.
        trust_remote_code: Code among the files may run.

    Raises:
        CheckpointError: The directory holds no model of the family.
    """
    if family == "state_dict":
        return Unserved()
    module, pool = open_directory(directory, family, trust_remote_code)
    return Classifier(module, pool) if family == "sequence_classification" else Continuation(module, pool)


def chosen(module: Any, params: Mapping[str, Any], otherwise: str = "expert") -> Any:
    """The module that answers: of compressed experts the one named, or what a build is for its task.

    Args:
        module: What was opened.
        params: `expert` names one; `preference` is that of a model which trades tasks for each other.
        otherwise: The parameter that names it where `expert` does not.

    Raises:
        ValueError: None is named, or one that is not there; or an expert is named of a single model; or as `prefer`.
    """
    prefer(module, list(params.get("preference") or []) or None)
    named = params.get("expert") or None
    if hasattr(module, "of"):
        return module.of(named or params.get(otherwise) or "")
    if named is not None:
        raise ValueError(f"this is a single model and holds no expert by name, got expert={named!r}; leave it out")
    return module


class Continuation:
    """A model that continues prompts, or answers them, greedily."""

    def __init__(self, module: Any, pool: Any) -> None:
        """Keep the model, and the pool of causal_lm or seq2seq that feeds it."""
        self._module, self._pool = module, pool

    def predict(self, model_input: pandas.DataFrame, params: Mapping[str, Any] | None = None) -> pandas.DataFrame:
        """Continue prompts.

        Args:
            model_input: A column `prompt` of texts.
            params: `max_new_tokens`, at least 1; `stop`, a text that ends a continuation and is no part of it;
                `expert`, which of compressed experts answers.

        Returns:
            A row for each prompt: `text`, what follows it, without the prompt.

        Raises:
            ValueError: A parameter or the input is not as said.
            CheckpointError: A prompt is longer than the model reads, or the model has no tokenizer.
        """
        import pandas

        prompts, asked = texts_of(model_input, "prompt"), params or {}
        n, stop = asked.get("max_new_tokens", MAX_NEW_TOKENS), asked.get("stop")
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"max_new_tokens is a whole number of at least 1, got {n!r}")
        if stop is not None and not isinstance(stop, str):
            raise ValueError(f"stop is a text that ends a continuation, got {stop!r}")
        found = self._pool.generate(chosen(self._module, asked), prompts, n, stop)
        return pandas.DataFrame({"text": found}, index=model_input.index)


class Classifier:
    """A sequence classifier with the head that was written: the base's, or the first expert's."""

    def __init__(self, module: Any, pool: Any) -> None:
        """Keep the model, and the pool of sequence_classification that feeds it."""
        self._module, self._pool = module, pool

    def predict(self, model_input: pandas.DataFrame, params: Mapping[str, Any] | None = None) -> pandas.DataFrame:
        """Classify texts.

        Args:
            model_input: A column `text`.
            params: `expert`, which of compressed experts answers, with its own head.

        Returns:
            A row for each text: `label`, and `probabilities` in the order of config.json's `id2label`.

        Raises:
            ValueError: The input is not as said, or the model does not choose one class for a text.
            CheckpointError: A text is longer than the model reads, or the model has no tokenizer.
        """
        import pandas
        import torch

        module = chosen(self._module, params or {})
        texts, labels = texts_of(model_input, "text"), _labels(module)
        shares: list[list[float]] = []
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH):
                logits = module(**self._pool.feed(texts[start : start + BATCH])).logits  # (B, K)
                shares += logits.softmax(-1).tolist()
        winners = [labels[max(range(len(labels)), key=row.__getitem__)] for row in shares]
        return pandas.DataFrame({"label": winners, "probabilities": shares}, index=model_input.index)


def _labels(module: Any) -> list[str]:
    """Names of the classes, in the order of the logits."""
    config = module.config
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        raise ValueError(
            f"the model does not choose one of several classes for a text (num_labels={config.num_labels}, "
            f"problem_type={config.problem_type}); load it with transformers to read its logits"
        )
    return [str(config.id2label[index]) for index in range(config.num_labels)]


class Unserved:
    """Tensors without a module."""

    def predict(self, model_input: pandas.DataFrame, params: Mapping[str, Any] | None = None) -> NoReturn:
        """Say that there is nothing to ask.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "a merged state dict has no module that could answer: read its safetensors files into a module of your own"
        )


def texts_of(model_input: pandas.DataFrame, column: str) -> list[str]:
    """A column that holds texts only.

    Raises:
        ValueError: There is no such column, or a value is no text.
    """
    if column not in model_input:
        raise ValueError(f"the input needs a column {column!r}, got {', '.join(map(str, model_input))}")
    found = list(model_input[column])
    strange = [(index, value) for index, value in enumerate(found) if not isinstance(value, str)]
    if strange:
        index, value = strange[0]
        raise ValueError(f"the column {column!r} holds texts, got {value!r} in row {index}")
    return found
