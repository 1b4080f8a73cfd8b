"""Class names and labels of a classification task, held to each other."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.splits import Splits, TaskError, quiet


def class_names(splits: Splits, column: str, labels: Sequence[str] | None) -> tuple[str, ...]:
    """The class names of a task: those given, else the label column's own.

    Raises:
        TaskError: There are none, or not as many as the data set has classes.
    """
    where, faults = f"task {splits.name}", []
    for dataset in splits.datasets.values():
        own = getattr(dataset.features[column], "names", None)
        if labels is None and own is None:
            faults.append(f"{where}: the column {column} of {splits.source} has no class names; give them as labels")
        if labels is not None and own is not None and len(labels) != len(own):
            faults.append(f"{where}: {len(labels)} labels are given, {splits.source} has {len(own)} classes")
    if faults:
        raise TaskError("\n".join(dict.fromkeys(faults)))
    return tuple(labels if labels is not None else splits.first.features[column].names)


def check_labels(splits: Splits, split: str, column: str, names: Sequence[str]) -> None:
    """Every label of a split is a class; a test split without labels has -1.

    Raises:
        TaskError: Some are not, or there is no such split.
    """
    with quiet(True):
        found = splits.of(split).unique(column)
    strange = [label for label in found if not isinstance(label, int) or not 0 <= label < len(names)]
    if strange:
        raise TaskError(
            f"task {splits.name}: labels of its {split} split are whole numbers from 0 to {len(names) - 1}, "
            f"found {', '.join(map(repr, strange[:5]))}"
        )
