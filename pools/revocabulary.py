"""A member with another vocabulary: rows of embedding and head are moved, filled and averaged as they are read."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import numpy as np
import torch

from pools.reading import Source

# What fills rows of tokens that a member lacks; a code from MEMBER on is the place of the member who gives the row.
OWNER, MEAN, BASE, PADDING, MEMBER = 0, 1, 2, 3, 4
LACKS = -1
_SCRATCH = 1 << 18  # elements read at once where rows are not in order
_BRIDGE = 1 << 13  # elements read in vain rather than reading twice


@dataclass(frozen=True)
class Plan:
    """Which row of whom each row of the output comes from; shared by the views of all members.

    Attributes:
        sources: Member -> its tensors; None is the base, where there is one.
        reference: Whose ids the output has: the base, or the first expert without one.
        rows: Member -> (V,) int32, its own row for each row of the output, or LACKS.
        known: (V,) bool, whether the row is a token's; the others pad.
        rules: (V,) int32, what fills the row where a member lacks it: OWNER, MEAN, BASE, PADDING or MEMBER + place.
        tensors: Name -> elements of a row, of all tensors that are rearranged.
    """

    sources: Mapping[str | None, Source]
    reference: str | None
    rows: Mapping[str | None, np.ndarray]
    known: np.ndarray
    rules: np.ndarray
    tensors: Mapping[str, int]
    _means: dict[tuple[str | None, str], torch.Tensor] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @cached_property
    def digest(self) -> str:
        """Hash of all that the plan says but the tensors."""
        found = hashlib.sha256(self.rules.tobytes())
        for member in self._in_order:
            found.update(json.dumps(member).encode() + self.rows[member].tobytes())
        return found.hexdigest()

    @cached_property
    def _in_order(self) -> list[str | None]:
        """Members in an order that is not the user's, so that sums do not depend on it."""
        return sorted(self.rows, key=lambda member: (member is not None, member or ""))

    def fill(self, member: str | None, name: str, first: int, out: torch.Tensor) -> None:
        """Rows [first, first + len(out)) of a member's rearranged tensor into `out`, (n, D) float32, contiguous."""
        own = self.rows[member][first : first + len(out)]
        have = np.flatnonzero(own != LACKS)
        gather(self.sources[member], name, own[have], out, have)
        lacking = np.flatnonzero(own == LACKS)
        rules = self.rules[first + lacking]
        for rule in np.unique(rules).tolist():
            self._fill_lacking(rule, member, name, first, lacking[rules == rule], out)

    def givers(self, member: str | None) -> list[str | None]:
        """Other members whose rows may stand in a member's view."""
        rules = set(np.unique(self.rules[self.rows[member] == LACKS]).tolist())
        if OWNER in rules:
            return [other for other in self._in_order if other != member]
        named = {list(self.rows)[rule - MEMBER] for rule in rules if rule >= MEMBER}
        named |= {self.reference} if rules & {BASE, PADDING} else set()
        return [other for other in self._in_order if other in named and other != member]

    def _fill_lacking(
        self, rule: int, member: str | None, name: str, first: int, at: np.ndarray, out: torch.Tensor
    ) -> None:
        if rule in (MEAN, PADDING):
            out[torch.from_numpy(at)] = self._mean(member if rule == MEAN else self.reference, name)
        elif rule == OWNER:
            step = max(1, _SCRATCH // out.shape[1])
            for begin in range(0, len(at), step):
                part = at[begin : begin + step]
                out[torch.from_numpy(part)] = self._owners_mean(name, first + part, out.shape[1])
        else:
            giver = self.reference if rule == BASE else list(self.rows)[rule - MEMBER]
            gather(self.sources[giver], name, self.rows[giver][first + at], out, at)

    def _owners_mean(self, name: str, wanted: np.ndarray, width: int) -> torch.Tensor:
        """Mean of the rows of the members who have the tokens, (n, D); of a single owner its very row."""
        total = torch.zeros(len(wanted), width)
        held = torch.empty(len(wanted), width)
        counts = np.zeros(len(wanted), dtype=np.float32)
        for member in self._in_order:
            rows = self.rows[member][wanted]
            have = np.flatnonzero(rows != LACKS)
            gather(self.sources[member], name, rows[have], held, have)
            total[torch.from_numpy(have)] += held[torch.from_numpy(have)]
            counts[have] += 1
        return total / torch.from_numpy(counts)[:, None]

    def _mean(self, member: str | None, name: str) -> torch.Tensor:
        """Mean over the rows of a member's own tokens, (D,); found once, row by row in float64."""
        with self._lock:
            if (member, name) not in self._means:
                width = self.tensors[name]
                rows = np.unique(self.rows[member][self.known])
                rows = rows[rows != LACKS]
                total = np.zeros(width, dtype=np.float64)
                step = max(1, _SCRATCH // width)
                for begin in range(0, len(rows), step):
                    part = rows[begin : begin + step]
                    held = torch.empty(len(part), width)
                    gather(self.sources[member], name, part, held, np.arange(len(part)))
                    total += np.add.reduce(held.numpy(), axis=0, dtype=np.float64)
                self._means[member, name] = torch.from_numpy(total / len(rows)).float()
            return self._means[member, name]


class Revocabulary(Mapping[str, torch.Tensor]):
    """A member whose embedding and head have the rows of another vocabulary; all else is as it was.

    Rows that a rule averages are float32 however they are read in parts; `[name]` rounds them to the member's dtype.
    """

    def __init__(self, plan: Plan, member: str | None, rows: int) -> None:
        """Show `plan.sources[member]`, whose vocabulary has `rows` rows, as the plan says."""
        self._plan, self._member, self._before = plan, member, rows
        self._inner = plan.sources[member]
        self._tensors = cast(Mapping[str, torch.Tensor], self._inner)  # every source is one
        self.source = self._inner.source

    @property
    def inner(self) -> Source:
        """The member as it is on the disk."""
        return self._inner

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, with the output's number of rows."""
        found = dict(self._inner.shapes)
        for name in self._plan.tensors:
            axis = -1 if name.endswith("final_logits_bias") else 0
            shape = list(found[name])
            shape[axis] = len(self._plan.rules)
            found[name] = tuple(shape)
        return found

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Name -> dtype of the member."""
        return self._inner.dtypes

    @property
    def nbytes(self) -> int:
        """Size of the rearranged tensors and all others together."""
        return self._inner.nbytes + sum(
            width * (len(self._plan.rules) - self._before) * self.dtypes[name].itemsize
            for name, width in self._plan.tensors.items()
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the contents of this member and of those who give rows, and of which row goes where."""
        return self._combined(lambda source: source.fingerprint)

    @property
    def stamp(self) -> str:
        """What changes when a file is changed that a row comes from, or the plan."""
        return self._combined(lambda source: source.stamp)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read elements [start, start + len(out)) into `out`; see `pools.reading.Source`."""
        width = self._plan.tensors.get(name)
        if width is None:
            self._inner.read(name, start, out)
            return
        done = 0
        while done < len(out):
            row, into = divmod(start + done, width)
            whole = 0 if into else (len(out) - done) // width
            if whole:
                self._plan.fill(self._member, name, row, out[done : done + whole * width].view(whole, width))
                done += whole * width
            else:  # the end of a row that an earlier part began, or the beginning of one
                held = torch.empty(1, width)
                self._plan.fill(self._member, name, row, held)
                n = min(width - into, len(out) - done)
                out[done : done + n] = held[0, into : into + n]
                done += n

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._plan.tensors:
            return self._tensors[name]
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        flat = tensor.view(-1)
        for start in range(0, len(flat), 4 * _SCRATCH):
            held = torch.empty(min(4 * _SCRATCH, len(flat) - start))
            self.read(name, start, held)
            flat[start : start + len(held)] = held.to(flat.dtype)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        return f"Revocabulary({self._inner!r}, {len(self._plan.rules)} rows)"

    def _combined(self, of: Callable[[Source], str]) -> str:
        givers = [of(self._plan.sources[giver]) for giver in self._plan.givers(self._member)]
        parts = [of(self._inner), self._plan.digest, str(self._member), *givers]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def view(plan: Plan, member: str | None, rows: int | None) -> Source:
    """A member as the plan has it: itself where its rows, of which it has `rows`, stay where they are."""
    stays = rows == len(plan.rules) and np.array_equal(plan.rows[member], np.arange(rows))
    return plan.sources[member] if rows is None or stays else Revocabulary(plan, member, rows)


def gather(source: Source, name: str, rows: np.ndarray, out: torch.Tensor, at: np.ndarray) -> None:
    """Read rows of a tensor into rows of `out`: `out[at] = tensor[rows]`, reading what lies together in one go.

    Args:
        source: Whose tensor.
        name: Of a tensor whose first axis has the rows, D elements each.
        rows: (n,) integers.
        out: (N, D) float32, contiguous.
        at: (n,) integers, rising.
    """
    if not len(rows):
        return
    width = out.shape[1]
    cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(at) != 1)) + 1
    if len(rows) * width >= len(cuts) * _BRIDGE:
        for begin, end in _pieces(cuts, len(rows)):
            to = int(at[begin])
            source.read(name, int(rows[begin]) * width, out[to : to + end - begin].view(-1))
        return
    order = np.argsort(rows, kind="stable")
    rows, at = rows[order], at[order]
    window = rows // max(1, _SCRATCH // width)
    cuts = np.flatnonzero((np.diff(rows).astype(np.int64) * width > _BRIDGE) | (np.diff(window) != 0)) + 1
    for begin, end in _pieces(cuts, len(rows)):
        first, last = int(rows[begin]), int(rows[end - 1])
        if end - begin == 1:
            source.read(name, first * width, out[int(at[begin])])
            continue
        held = torch.empty((last - first + 1) * width)
        source.read(name, first * width, held)
        chosen = torch.from_numpy(rows[begin:end] - first).long()
        out[torch.from_numpy(at[begin:end])] = held.view(-1, width).index_select(0, chosen)


def _pieces(cuts: np.ndarray, n: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of what lies between cuts."""
    edges = [0, *cuts.tolist(), n]
    return itertools.pairwise(edges)
