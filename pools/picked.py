"""Sources made of others by name alone: patterns that choose among names, and tensors under other names.

Nothing is read until a tensor, or a part of one, is asked for, and then straight from the file it stands in.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import cast

import torch

from pools.faults import Spec, specs_of
from pools.headers import CheckpointError
from pools.patterns import PatternError, matcher
from pools.reading import Source, read_into

Tensors = Mapping[str, torch.Tensor]  # a `pools.reading.Source`, wherever more than names, shapes and values is asked


def select(names: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The names that fit one of the patterns and none of those that begin with `!`, in their own order.

    Args:
        names: Tensor names.
        patterns: As `pools.patterns.matcher` takes them; only excluding ones exclude from all.

    Raises:
        CheckpointError: A pattern fits nothing, or all is excluded; the message says so for each.

    >>> select(["a.weight", "a.bias", "b.weight"], ["*.weight", "!b.*"])
    ('a.weight',)
    """
    names = list(names)
    try:
        wanted = {pattern: matcher(pattern) for pattern in patterns if not pattern.startswith("!")}
        unwanted = {pattern: matcher(pattern[1:]) for pattern in patterns if pattern.startswith("!")}
    except PatternError as error:
        raise CheckpointError(str(error)) from error
    faults = [
        f"the pattern {pattern!r} fits none of the {len(names)} tensors{_near(pattern, names)}"
        for pattern, fits in (wanted | unwanted).items()
        if not any(map(fits, names))
    ]
    if faults:
        raise CheckpointError("\n".join(faults))
    found = tuple(
        name
        for name in names
        if (not wanted or any(fits(name) for fits in wanted.values()))
        and not any(fits(name) for fits in unwanted.values())
    )
    if not found:
        raise CheckpointError(f"the patterns {', '.join(map(repr, patterns))} leave no tensor to merge")
    return found


def _near(pattern: str, names: list[str]) -> str:
    """The name that is most like a pattern, as a hint."""
    plain = pattern.lstrip("!").removeprefix("re:").replace("*", "")
    close = difflib.get_close_matches(plain, names, n=1, cutoff=0.0)
    return f"; the closest name is {close[0]}" if close else ""


class Picked(Mapping[str, torch.Tensor]):
    """Tensors of other sources under names of its own; implements `pools.reading.Source`.

    Attributes:
        source: What the user called it.
        parts: Name -> the source that has the tensor, and its name there.
    """

    def __init__(self, parts: Mapping[str, tuple[Tensors, str]], source: str) -> None:
        self.parts, self.source = dict(parts), source

    def __getitem__(self, name: str) -> torch.Tensor:
        tensors, inner = self.parts[name]
        return tensors[inner]

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read elements [start, start + len(out)) of a tensor; see `pools.reading.Source`."""
        tensors, inner = self.parts[name]
        read_into(tensors, inner, start, out)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __contains__(self, name: object) -> bool:
        return name in self.parts

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {len(self)} tensors)"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tuple(self._specs[id(tensors)][inner].shape) for name, (tensors, inner) in self.parts.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name -> dtype."""
        return {name: self._specs[id(tensors)][inner].dtype for name, (tensors, inner) in self.parts.items()}

    @property
    def nbytes(self) -> int:
        """Size of all tensors together; one that stands under two names counts twice, as it is read twice."""
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the sources' contents and of which of their tensors stand under which names."""
        told = {key: cast(Source, tensors).fingerprint for key, tensors in self._sources.items()}
        facts = [(name, told[id(tensors)], inner) for name, (tensors, inner) in sorted(self.parts.items())]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def stamp(self) -> str:
        """What changes when a file of one of the sources is changed, or which of their tensors are taken."""
        numbers = {key: number for number, key in enumerate(self._sources)}
        facts = [(name, numbers[id(tensors)], inner) for name, (tensors, inner) in self.parts.items()]
        return json.dumps([[cast(Source, tensors).stamp for tensors in self._sources.values()], facts])

    @cached_property
    def _sources(self) -> dict[int, Tensors]:
        """The sources, each once."""
        return {id(tensors): tensors for tensors, _ in self.parts.values()}

    @cached_property
    def _specs(self) -> dict[int, dict[str, Spec]]:
        return {key: specs_of(tensors) for key, tensors in self._sources.items()}


class Selected(Picked):
    """Some tensors of a source, under their own names."""

    def __init__(self, source: Tensors, names: Iterable[str]) -> None:
        """Take these of its tensors.

        Raises:
            CheckpointError: The source lacks some.
        """
        names = tuple(names)
        called = name_of(source)
        lacking = [name for name in names if name not in source]
        if lacking:
            raise CheckpointError(f"{called} lacks {len(lacking)} of the wanted tensors, the first {lacking[0]}")
        super().__init__({name: (source, name) for name in names}, called)


def name_of(source: Tensors) -> str:
    """What the user called a source."""
    return str(getattr(source, "source", "a state dict"))
