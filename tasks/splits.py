"""A data set found by path or hub id, with its splits as `datasets` reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_TIMEOUT_S = 10.0  # until the hub answers


class TaskError(ValueError):
    """A data set cannot be found or does not fit the task; the message says what to do."""


class Splits:
    """The splits of a data set, mapped from the cache of `datasets`.

    Attributes:
        name: The task's.
        source: Where the rows come from, as the user called it.
        datasets: Split -> rows.
    """

    def __init__(
        self,
        name: str,
        path: str,
        splits: Mapping[str, str],
        subset: str | None = None,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        """Open the data set; rows are read when they are asked for.

        Args:
            name: The task's, for errors.
            path: A directory (`train.parquet` and so on, or the hub's layout), or a hub id `org/name[@revision]`.
            splits: train, validation, test -> the split as `datasets` spells it, such as `train[90%:]`, which is
                a tenth of the rows in a seeded random order.
            subset: The data set's configuration, where it has several.
            root: With it, hub ids and relative paths are looked up as root/<path> and nowhere else.

        Raises:
            TaskError: There is no such data set, or it lacks a split.
        """
        self.name, self.source, self.splits, self._subset = name, path, dict(splits), subset
        self._place, self._revision = _find(name, path, root)
        if not splits:
            raise TaskError(f"task {name} has no splits")
        self.datasets = {split: self._open(split) for split in self.splits}

    @property
    def first(self) -> Dataset:
        """One of the splits: all have the same columns."""
        return next(iter(self.datasets.values()))

    def of(self, split: str) -> Dataset:
        """The rows of a split.

        Raises:
            TaskError: The task has no such split.
        """
        if split not in self.datasets:
            raise TaskError(f"task {self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.datasets[split]

    def lacking(self, columns: list[str]) -> list[str]:
        """What is to be said of columns that some split lacks."""
        faults = []
        for dataset in self.datasets.values():
            missing = [column for column in columns if column not in dataset.column_names]
            if missing:
                faults.append(
                    f"task {self.name}: {self.source} has no column {' and no column '.join(missing)}; "
                    f"it has {', '.join(dataset.column_names)}"
                )
        return list(dict.fromkeys(faults))

    @cached_property
    def _builder(self) -> Any:
        """The data set, prepared in the usual cache of `datasets`."""
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            with quiet(self._revision is None and Path(self._place).exists()):
                builder = datasets.load_dataset_builder(self._place, self._subset, revision=self._revision)
                builder.download_and_prepare()
        except (OSError, ValueError, DatasetsError) as error:
            raise TaskError(
                f"task {self.name}: {self.source} cannot be opened as a data set: {first_line(error)}"
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
                f"{known}: {first_line(error)}; a split is spelled like test, train[90%:] or train[:1000]"
            ) from error


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
        why = f"the hub does not answer ({first_line(error)})"
        raise TaskError(f"task {name}: {hub_id} is not in the cache, and {why}; {local}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def quiet(wanted: bool) -> Iterator[None]:
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
