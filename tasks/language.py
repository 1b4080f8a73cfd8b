"""Language tasks: perplexity of texts, exact answers to prompts, classes of texts.

A column is given by its name, or as a template that joins several: `question: {question} sentence: {sentence}`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from string import Formatter
from typing import TYPE_CHECKING, Any

from tasks.labels import check_labels, class_names
from tasks.splits import Splits, TaskError

if TYPE_CHECKING:
    from datasets import Dataset

Row = str | tuple[str, str] | tuple[str, int]  # a text; prompt and target; text and label

METRICS = {
    "perplexity": "perplexity",
    "exact_match": "exact_match",
    "text_classification": "accuracy",
    "preference": "accuracy",
}


class Rows:
    """One split: rows made when they are asked for."""

    def __init__(self, dataset: Dataset, columns: Sequence[str], label: str | None, where: str) -> None:
        self._columns, self._label, self._where = columns, label, where
        used = [name for column in columns for name in names_in(column)] + ([label] if label else [])
        self._dataset = dataset.select_columns(list(dict.fromkeys(used)))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        row: Any = self._dataset[index]
        texts = tuple(self._text(column, row, index) for column in self._columns)
        if self._label is not None:
            return texts[0], row[self._label]
        return texts if len(texts) == 2 else texts[0]

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every row as the model sees it, in order."""
        digest = hashlib.sha256()
        for row in self:
            for part in (row,) if isinstance(row, str) else row:
                content = str(part).encode()
                digest.update(f"{len(content)} ".encode() + content)
        return digest.hexdigest()

    def _text(self, column: str, row: Mapping[str, Any], index: int) -> str:
        values = [row[name] for name in names_in(column)]
        if "{" in column and None not in values:
            return column.format_map(row)
        if isinstance(values[0], str):
            return values[0]
        raise TaskError(
            f"{self._where}, row {index}: the column {column} holds {values[0]!r}, which is no text"
            + ("" if None in values else f"; '{{{column}}}' makes a text of it")
        )


class LanguageTask:
    """A data set of texts as a task.

    Attributes:
        name: What metrics are logged under.
        kind: perplexity, exact_match or text_classification.
        source: Where the rows come from, as the user called it.
        labels: Class names of text_classification, by label.
        version: Counts up when results can no longer be compared with earlier ones.
        max_new_tokens: Most tokens of an answer.
        stop: What ends an answer; None: the model's own end of text.
        block: Tokens that a model sees at a time of all texts in a row; None: each text on its own.
    """

    templates: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        kind: str,
        path: str,
        splits: Mapping[str, str],
        labels: Sequence[str] | None = None,
        *,
        text: str | None = "text",
        prompt: str = "prompt",
        target: str = "target",
        label: str = "label",
        chosen: str = "chosen",
        rejected: str = "rejected",
        max_new_tokens: int = 32,
        stop: str | None = None,
        block: int | None = None,
        subset: str | None = None,
        version: int = 1,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        """Open the data set; rows are read when they are asked for.

        Args:
            name: What metrics are logged under.
            kind: Of `METRICS`.
            path: As `tasks.splits.Splits` takes it, and so `splits`, `subset` and `root`.
            splits: train, validation, test -> the split as `datasets` spells it.
            labels: Class names of text_classification; by default the label column's own.
            text: Column of texts; None for the perplexity of targets that follow a prompt.
            prompt: Column of prompts.
            target: Column of right answers.
            label: Column of labels.
            chosen: Column of the better texts of a preference task.
            rejected: Column of the worse ones.
            max_new_tokens: Most tokens of an answer.
            stop: What ends an answer.
            block: Tokens seen at a time, at least 2.
            subset: The data set's configuration, where it has several.
            version: Counts up when results can no longer be compared with earlier ones.
            root: With it, hub ids and relative paths are looked up as root/<path> and nowhere else.

        Raises:
            TaskError: All that is wrong with the data set, a line each.
        """
        self.name, self.kind, self.source, self.version = name, kind, path, version
        self.metric, self.higher_is_better = METRICS[kind], kind != "perplexity"
        self.max_new_tokens, self.stop, self.block = max_new_tokens, stop, block
        self._label = label if kind == "text_classification" else None
        pairs = kind == "exact_match" or text is None
        self._texts = (prompt, target) if pairs or text is None else (text,)
        if kind == "preference":
            self._texts = (chosen, rejected)
        self._splits = Splits(name, path, splits, subset, root)
        used = [each for column in self._texts for each in names_in(column)]
        lacking = self._splits.lacking(used + ([self._label] if self._label else []))
        lacking += [] if lacking else self._not_texts()
        if lacking:
            raise TaskError("\n".join(lacking))
        self.labels = class_names(self._splits, self._label, labels) if self._label else ()
        self._rows: dict[str, Rows] = {}

    @property
    def columns(self) -> Mapping[str, str]:
        """What a row has, in MLflow's words."""
        names = ("prompt", "target") if len(self._texts) == 2 else ("text",)
        names = ("chosen", "rejected") if self.kind == "preference" else names
        return dict.fromkeys(names, "string") | ({"label": "long"} if self._label else {})

    def rows(self, split: str) -> Rows:
        """Texts, pairs of prompt and target, or pairs of text and label.

        Raises:
            TaskError: The task has no such split, or labels that are no class.
        """
        dataset = self._splits.of(split)
        if split not in self._rows:
            if self._label is not None:
                check_labels(self._splits, split, self._label, self.labels)
            self._rows[split] = Rows(dataset, self._texts, self._label, f"task {self.name}, {split} split")
        return self._rows[split]

    def fingerprint(self, split: str) -> str:
        """SHA-256 of a split's rows."""
        return self.rows(split).fingerprint

    def _not_texts(self) -> list[str]:
        """Columns, given by name alone, that hold something else."""
        features = self._splits.first.features
        kinds = {column: getattr(features[column], "dtype", "") for column in self._texts if "{" not in column}
        return [
            f"task {self.name}: the column {column} of {self.source} holds {kind or 'no texts'}; "
            f"'{{{column}}}' makes a text of it"
            for column, kind in kinds.items()
            if kind not in ("string", "large_string")
        ]


def names_in(column: str) -> list[str]:
    """The data set's columns that a column of ours is made of.

    >>> names_in("text"), names_in("{question} It is {answer}")
    (['text'], ['question', 'answer'])
    """
    if "{" not in column:
        return [column]
    try:
        return [field for _, field, _, _ in Formatter().parse(column) if field is not None]
    except ValueError as error:
        raise TaskError(
            f"{column!r} is no template of columns such as '{{question}} is {{answer}}': {error}"
        ) from error
