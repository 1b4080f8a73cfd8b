"""A task's rows for a model: images fed through the pool once and kept while they fit, texts as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

KEPT_BYTES = 2 << 30  # of one task's inputs in memory; larger ones are fed batch by batch, each time anew

Inputs = dict[str, torch.Tensor]


class Rows(Protocol):
    """A split: pairs of what the pool feeds and a label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


class Feeder(Protocol):
    """Of a pool, what turns rows into the module's inputs."""

    def feed(self, rows: Sequence[Any]) -> Inputs:
        """Rows as keyword inputs, each with a batch dimension."""
        ...


@dataclass
class Examples:
    """Images of one task's split as tensors."""

    kind: ClassVar[str] = "image_classification"
    rows: Rows
    pool: Feeder
    head: torch.Tensor  # (K, D)
    indices: Sequence[int]
    _kept: tuple[Inputs, torch.Tensor] | None = None
    _fits: bool = True  # until it was found otherwise

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: Sequence[int]) -> tuple[Inputs, torch.Tensor]:
        """Inputs and labels (B,) of some of the examples."""
        if self._kept is None and not (self._fits and self._keep()):
            return self._feed(positions)
        inputs, labels = self._kept  # type: ignore[misc]
        chosen = torch.as_tensor(positions)
        return {key: tensor[chosen] for key, tensor in inputs.items()}, labels[chosen]

    def batches(self, positions: Sequence[int], size: int) -> Iterator[tuple[Inputs, torch.Tensor]]:
        """All of the positions, `size` at a time."""
        for start in range(0, len(positions), size):
            yield self.batch(positions[start : start + size])

    def keep_on(self, device: torch.device) -> None:
        """Feed everything now and keep it on a device, if it fits into memory."""
        if self._kept is None and not (self._fits and self._keep()):
            return
        inputs, labels = self._kept  # type: ignore[misc]
        self._kept = {key: tensor.to(device) for key, tensor in inputs.items()}, labels.to(device)

    def _feed(self, positions: Sequence[int]) -> tuple[Inputs, torch.Tensor]:
        """Rows read and turned into the module's inputs."""
        rows, labels = zip(*(self.rows[self.indices[position]] for position in positions), strict=True)
        return self.pool.feed(rows), torch.tensor(labels)

    def _keep(self) -> bool:
        """Feed everything once, if it fits."""
        one, _ = self._feed([0])
        self._fits = sum(tensor.nbytes for tensor in one.values()) * len(self) <= KEPT_BYTES
        if not self._fits:
            return False
        parts = [self._feed(range(start, min(start + 64, len(self)))) for start in range(0, len(self), 64)]
        inputs = {key: torch.cat([part[key] for part, _ in parts]) for key in one}
        self._kept = inputs, torch.cat([labels for _, labels in parts])
        return True


@dataclass(frozen=True)
class Texts:
    """Rows of one language task's split: texts, pairs of prompt and target, or pairs of text and label."""

    kind: str  # perplexity, exact_match or text_classification
    rows: Sequence[Any]
    pool: Any  # of language models: its tokenizer and generation settings
    indices: Sequence[int]
    labels: Sequence[str] = ()
    expert: str | None = None  # whose head tells the classes; None: the base's
    max_new_tokens: int = 32
    stop: str | None = None
    block: int | None = None
    heads: Any = None  # the pool whose members' heads are used, where that is another

    def __len__(self) -> int:
        return len(self.indices)

    def chosen(self, positions: Sequence[int]) -> list[Any]:
        """Some of the rows."""
        return [self.rows[self.indices[position]] for position in positions]

    def batches(self, positions: Sequence[int], size: int) -> Iterator[list[Any]]:
        """All of the positions, `size` at a time, the longest first, so that little is padded."""
        rows = sorted(self.chosen(positions), key=_length, reverse=True)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _length(row: Any) -> int:
    """Characters of a row."""
    return len(row) if isinstance(row, str) else sum(len(part) for part in row if isinstance(part, str))


def choose(n_rows: int, wanted: int | None, seed: int) -> Sequence[int]:
    """All rows, or a seeded choice of as many as wanted."""
    if wanted is None or wanted >= n_rows:
        return range(n_rows)
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(n_rows, generator=generator)[:wanted].tolist())


def endless(n: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of positions without end, reshuffled each time all have come."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(n, generator=generator).tolist()
        yield queue[:size]
        del queue[:size]
