"""A classifier's head where a base has none, or one of other classes: a fresh one, beside the base's own weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from pools.headers import CheckpointError
from pools.language import SequenceClassificationPool, n_labels
from pools.language_frame import quiet


def n_classes(path: Path, source: str) -> int | None:
    """How many classes a checkpoint's head tells apart; None where it has no head."""
    heads = SequenceClassificationPool((path, source), {}).heads
    return n_labels(heads[None]) if None in heads else None


def with_new_head(path: Path, directory: Path, n: int, seed: int, trust_remote_code: bool = False) -> None:
    """Write a copy of a model that has a fresh head, as transformers draws one.

    Args:
        path: The model's directory.
        directory: Where the copy is written.
        n: Classes of the head.
        seed: Of its weights.
        trust_remote_code: Code among the files may run.

    Raises:
        CheckpointError: transformers knows no classifier of that architecture.
    """
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    try:
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=n,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError) as error:
        told = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{path} cannot be given the head of a classifier: {told}") from error
    model.save_pretrained(directory)
    for file in sorted(path.iterdir()):
        beside = file.suffix in (".json", ".txt", ".model", ".jinja", ".py") and not file.name.endswith(".index.json")
        if beside and not (directory / file.name).exists():
            shutil.copyfile(file, directory / file.name)
