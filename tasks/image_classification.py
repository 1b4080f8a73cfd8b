"""Image classification: a data set of images and integer labels, with class names and prompt templates."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_TIMEOUT_S = 10.0  # until the hub answers


class TaskError(ValueError):
    """A data set cannot be found or does not fit the task; the message says what to do."""


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


class Task:
    """A data set as a task: splits, class names, templates.

    Attributes:
        name: What metrics are logged under.
        source: Where the rows come from, as the user called it.
        labels: Class names, by label.
        templates: Prompts with one `{}` each.
        version: Counts up when results can no longer be compared with earlier ones.
    """

    metric = "accuracy"

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
            path: A directory (`train.parquet` and so on, or the hub's layout), or a hub id `org/name[@revision]`.
            splits: train, validation, test -> the split as `datasets` spells it, such as `train[90%:]`, which is
                a tenth of the rows in a seeded random order.
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
        self.name, self.source, self.splits, self.version = name, path, dict(splits), version
        self.templates = tuple(templates)
        self._image, self._label = image, label
        self._place, self._revision = _find(name, path, root)
        self._subset = subset
        datasets = {split: self._open(split) for split in self.splits}
        faults = [fault for dataset in datasets.values() for fault in self._faults(dataset, labels)]
        if not datasets:
            faults = [f"task {name} has no splits"]
        if faults:
            raise TaskError("\n".join(dict.fromkeys(faults)))
        first = next(iter(datasets.values()))
        self.labels: tuple[str, ...] = tuple(labels if labels is not None else first.features[label].names)
        self._datasets = datasets
        self._rows: dict[str, Rows] = {}

    def rows(self, split: str) -> Rows:
        """Pairs of image and label of a split.

        Raises:
            TaskError: The task has no such split, or labels that are no class.
        """
        if split not in self.splits:
            raise TaskError(f"task {self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        if split not in self._rows:
            dataset = self._datasets[split]
            self._check_labels(split, dataset)
            if not _is_image(dataset.features[self._image]):
                from datasets import Image as ImageFeature

                dataset = dataset.cast_column(self._image, ImageFeature())
            self._rows[split] = Rows(dataset, self._image, self._label)
        return self._rows[split]

    def fingerprint(self, split: str) -> str:
        """SHA-256 of a split's images and labels."""
        return self.rows(split).fingerprint

    @cached_property
    def _builder(self) -> Any:
        """The data set, prepared in the usual cache of `datasets`."""
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            with _quiet(self._revision is None and Path(self._place).exists()):
                builder = datasets.load_dataset_builder(self._place, self._subset, revision=self._revision)
                builder.download_and_prepare()
        except (OSError, ValueError, DatasetsError) as error:
            raise TaskError(
                f"task {self.name}: {self.source} cannot be opened as a data set: {_first(error)}"
            ) from error
        return builder

    def _open(self, split: str) -> Dataset:
        """A split, mapped from the cache; a slice is cut from shuffled rows, as data sets are often sorted by class."""
        from datasets import ReadInstruction, concatenate_datasets

        expression, builder = self.splits[split], self._builder
        sizes = {name: info.num_examples for name, info in (builder.info.splits or {}).items()}
        try:
            if "[" not in expression or not builder.as_dataset(split=expression).num_rows:
                return builder.as_dataset(split=expression)
            cut = ReadInstruction.from_spec(expression).to_absolute(sizes)
            parts = [builder.as_dataset(split=part.splitname).shuffle(seed=0) for part in cut]
            chosen = [rows.select(range(part.from_, part.to)) for rows, part in zip(parts, cut, strict=True)]
            return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)
        except (ValueError, KeyError, AssertionError) as error:
            known = ", ".join(builder.info.splits or {})
            raise TaskError(
                f"task {self.name}: its {split} split {expression!r} cannot be read from {self.source}, which has "
                f"{known}: {_first(error)}; a split is spelled like test, train[90%:] or train[:1000]"
            ) from error

    def _faults(self, dataset: Dataset, labels: Sequence[str] | None) -> list[str]:
        """What the columns of a split lack."""
        where = f"task {self.name}"
        columns = dataset.column_names
        missing = [column for column in (self._image, self._label) if column not in columns]
        if missing:
            return [
                f"{where}: {self.source} has no column {' and no column '.join(missing)}; it has {', '.join(columns)}"
            ]
        faults = []
        own = getattr(dataset.features[self._label], "names", None)
        if labels is None and own is None:
            faults.append(f"{where}: the column {self._label} of {self.source} has no class names; give them as labels")
        if labels is not None and own is not None and len(labels) != len(own):
            faults.append(f"{where}: {len(labels)} labels are given, {self.source} has {len(own)} classes")
        return faults

    def _check_labels(self, split: str, dataset: Dataset) -> None:
        """Every label is a class; a test split without labels has -1.

        Raises:
            TaskError: Some are not.
        """
        with _quiet(True):
            found = dataset.unique(self._label)
        strange = [label for label in found if not isinstance(label, int) or not 0 <= label < len(self.labels)]
        if strange:
            raise TaskError(
                f"task {self.name}: labels of its {split} split are whole numbers from 0 to {len(self.labels) - 1}, "
                f"found {', '.join(map(repr, strange[:5]))}"
            )


open_task = Task  # called as the pools' open_pool is


def _find(name: str, path: str, root: str | os.PathLike[str] | None) -> tuple[str, str | None]:
    """What `datasets` is to open, and the revision of a hub data set.

    Raises:
        TaskError: There is nothing there; or the hub does not answer, and the data set is not in the cache.
    """
    plain, _, revision = path.partition("@")
    place = Path(path).expanduser()
    if root is not None and not place.is_absolute() and not path.startswith(("./", "../")):
        place = Path(root).expanduser() / plain
    elif not place.exists() and _HUB_ID.match(plain) and not path.startswith(("./", "../")):
        _ask_hub(name, plain)
        return plain, revision or None
    if not place.is_dir():
        raise TaskError(
            f"task {name}: there is no data set at {place}; give a directory with parquet files, or a hub id"
        )
    return str(place.absolute()), None


def _ask_hub(name: str, hub_id: str) -> None:
    """One bounded question before `datasets` asks with many retries.

    Raises:
        TaskError: The hub does not answer, and the data set was never downloaded.
    """
    from datasets import config
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if (Path(config.HF_DATASETS_CACHE) / hub_id.replace("/", "___")).exists():
        return
    local = f"to use a local copy put it under ROOT/{hub_id} and set root=ROOT, or give its path"
    if constants.HF_HUB_OFFLINE:
        raise TaskError(
            f"task {name}: {hub_id} is not in the cache, and the hub is switched off (HF_HUB_OFFLINE); {local}"
        )
    try:
        HfApi().dataset_info(hub_id, timeout=_TIMEOUT_S)
    except RepositoryNotFoundError as error:
        raise TaskError(
            f"task {name}: {hub_id} is neither a directory nor, for this login, on the hub; {local}"
        ) from error
    except Exception as error:  # whatever the hub's HTTP client raises, and that has changed between versions
        why = f"the hub does not answer ({_first(error)})"
        raise TaskError(f"task {name}: {hub_id} is not in the cache, and {why}; {local}") from error


def _first(error: BaseException) -> str:
    """The first line of an error, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _is_image(feature: Any) -> bool:
    from datasets import Image as ImageFeature

    return isinstance(feature, ImageFeature)


@contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """No progress bars where nothing is downloaded."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    if wanted and shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if wanted and shown:
            datasets.enable_progress_bars()
