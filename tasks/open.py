"""Opens a task by its kind."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tasks.image_classification import ImageClassification
from tasks.language import METRICS, LanguageTask


class Task(Protocol):
    """A data set that models are scored on."""

    name: str
    source: str
    version: int
    labels: tuple[str, ...]
    templates: tuple[str, ...]

    @property
    def kind(self) -> str:
        """How it is scored."""
        ...

    @property
    def metric(self) -> str:
        """What its score is called."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher score is a better one."""
        ...

    @property
    def columns(self) -> Mapping[str, str]:
        """What a row has: name -> type in MLflow's words."""
        ...

    def rows(self, split: str) -> Any:
        """The rows of a split: a sequence."""
        ...

    def fingerprint(self, split: str) -> str:
        """SHA-256 of a split's rows."""
        ...


def open_task(
    name: str,
    kind: str,
    path: str,
    splits: Mapping[str, str],
    labels: Sequence[str] | None = None,
    *,
    subset: str | None = None,
    version: int = 1,
    root: str | os.PathLike[str] | None = None,
    **columns: Any,
) -> Task:
    """Open a task.

    Args:
        name: What metrics are logged under.
        kind: image_classification, or of `tasks.language.METRICS`.
        path: As `tasks.splits.Splits` takes it, and so `splits`, `subset` and `root`.
        splits: train, validation, test -> the split as `datasets` spells it.
        labels: Class names; by default the label column's own.
        subset: The data set's configuration, where it has several.
        version: Counts up when results can no longer be compared with earlier ones.
        root: With it, hub ids and relative paths are looked up as root/<path> and nowhere else.
        columns: What else the kind takes.

    Raises:
        TaskError: All that is wrong with the data set, a line each.
    """
    shared: dict[str, Any] = {"labels": labels, "subset": subset, "version": version, "root": root, **columns}
    if kind in METRICS:
        return LanguageTask(name, kind, path, splits, **shared)
    return ImageClassification(name, path, splits, **shared)
