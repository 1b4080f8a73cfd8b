"""Image classification: a data set of images and integer labels, with class names and prompt templates."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tasks.labels import check_labels, class_names
from tasks.splits import Splits, TaskError

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


class Rows:
    """One split: images, decoded when they are asked for, with their labels."""

    def __init__(self, dataset: Dataset, image: str, label: str) -> None:
        self._dataset = dataset.select_columns([image, label])
        self._image, self._label = image, label

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        row: Any = self._dataset[index]
        return row[self._image], row[self._label]

    def __iter__(self) -> Iterator[tuple[Image, int]]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every row's label and encoded image, in order: the same on every machine and in every cache."""
        from datasets import Image as ImageFeature

        digest = hashlib.sha256()
        encoded = self._dataset.cast_column(self._image, ImageFeature(decode=False))
        for row in cast(Iterable[dict[str, Any]], encoded):
            stored = row[self._image]
            content = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
            digest.update(f"{row[self._label]} {len(content)} ".encode())
            digest.update(content)
        return digest.hexdigest()


class ImageClassification:
    """A data set as a task: splits, class names, templates.

    Attributes:
        name: What metrics are logged under.
        source: Where the rows come from, as the user called it.
        labels: Class names, by label.
        templates: Prompts with one `{}` each.
        version: Counts up when results can no longer be compared with earlier ones.
    """

    kind, metric, higher_is_better = "image_classification", "accuracy", True
    columns: Mapping[str, str] = {"image": "binary", "label": "long"}  # of `rows`, in MLflow's words

    def __init__(
        self,
        name: str,
        path: str,
        splits: Mapping[str, str],
        labels: Sequence[str] | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
        *,
        image: str = "image",
        label: str = "label",
        subset: str | None = None,
        version: int = 1,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        """Open the data set; rows are read when they are asked for.

        Args:
            name: What metrics are logged under.
            path: As `tasks.splits.Splits` takes it, and so `splits`, `subset` and `root`.
            splits: train, validation, test -> the split as `datasets` spells it.
            labels: Class names; by default the label column's own.
            templates: Prompts with one `{}` each.
            image: The column of images.
            label: The column of labels.
            subset: The data set's configuration, where it has several.
            version: Counts up when results can no longer be compared with earlier ones.
            root: With it, hub ids and relative paths are looked up as root/<path> and nowhere else.

        Raises:
            TaskError: All that is wrong with the data set, a line each.
        """
        self.name, self.source, self.version = name, path, version
        self.templates = tuple(templates)
        self._image, self._label = image, label
        self._splits = Splits(name, path, splits, subset, root)
        lacking = self._splits.lacking([image, label])
        if lacking:
            raise TaskError("\n".join(lacking))
        self.labels = class_names(self._splits, label, labels)
        self._rows: dict[str, Rows] = {}

    def rows(self, split: str) -> Rows:
        """Pairs of image and label of a split.

        Raises:
            TaskError: The task has no such split, or labels that are no class.
        """
        dataset = self._splits.of(split)
        if split not in self._rows:
            check_labels(self._splits, split, self._label, self.labels)
            if not _is_image(dataset.features[self._image]):
                from datasets import Image as ImageFeature

                dataset = dataset.cast_column(self._image, ImageFeature())
            self._rows[split] = Rows(dataset, self._image, self._label)
        return self._rows[split]

    def fingerprint(self, split: str) -> str:
        """SHA-256 of a split's images and labels."""
        return self.rows(split).fingerprint


def _is_image(feature: Any) -> bool:
    from datasets import Image as ImageFeature

    return isinstance(feature, ImageFeature)
