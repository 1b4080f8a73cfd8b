"""Veneers around a rule: which are asked for, what the engine must know of the whole, and how one piece is dressed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.config import RunConfig, closest
from methods.catalogue import VENEERS
from methods.kinds import Base, Kind, Piece, Pieces, Row, Veneer, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from methods.kinds import Dressed

Dress = Callable[[Piece], "Dressed"]


@dataclass(frozen=True)
class Worn:
    """A veneer with its parameters."""

    veneer: Veneer
    params: Any


def faults(row: Row, names: Sequence[str]) -> list[str]:
    """Why these veneers cannot be put around a method, a line each."""
    unknown = [
        f"veneers: no veneer is called {name!r}; {closest(name, VENEERS)}" for name in names if name not in VENEERS
    ]
    reasons = {
        Kind.build: "builds a module and merges no tensors one by one",
        Kind.search: "learns coefficients of the bare rule; put the veneer around that rule instead",
        Kind.fold: "takes the experts one after the other, so that there is no rule to put it around",
        Kind.compression: "keeps the experts apart, so that there is no merge to put it around",
    }
    refused = []
    if names and row.kind in reasons:
        refused.append(f"veneers: {', '.join(names)} cannot go around {row.name}, which {reasons[row.kind]}")
    return [*unknown, *refused]


@functools.cache
def settings() -> type:
    """The section `veneer` of a configuration: the parameters of each by its name."""
    classes = {name: veneer.load_params() for name, veneer in VENEERS.items()}
    entries = [(name, cls, field(default_factory=cls)) for name, cls in classes.items()]
    return make_dataclass("VeneerSettings", entries, frozen=True, namespace={"__module__": __name__})


def __getattr__(name: str) -> type:
    """`VeneerSettings`, under which pickle looks for the class in a study's worker."""
    if name == "VeneerSettings":
        return settings()
    raise AttributeError(f"module {__name__} has no attribute {name}")


def asked(config: RunConfig) -> tuple[Worn, ...]:
    """The veneers that a configuration asks for."""
    return tuple(Worn(VENEERS[name], getattr(config.veneer, name)) for name in config.veneers)


def veneered(row: Row, around: Iterable[Worn]) -> Row:
    """The row of a rule with its veneers: what the engine must know of the whole."""
    for layer in around:
        row = replace(row, base=Base.needed, elementwise=row.elementwise and layer.veneer.elementwise)
        if layer.veneer.aligns:  # what is kept for a search holds for the experts' own numbers alone
            row = replace(row, kept="", unread=())
    return row


def undressed(piece: Piece) -> Dressed:
    """Without veneers: the piece itself, and what the rule makes of it."""
    return piece, lambda merged: merged


def dresser(around: Sequence[Worn], pieces: Pieces) -> Dress:
    """How pieces are dressed; passes over the whole model that veneers need are made here."""
    if not around:
        return undressed
    numbers = [resolve(one.veneer.prepare)(pieces, one.params) if one.veneer.prepare else None for one in around]

    def dress(piece: Piece) -> Dressed:
        steps: list[Callable[[Tensor], Tensor]] = []
        for one, found in zip(reversed(around), reversed(numbers), strict=True):  # the outermost sees the experts
            piece, finish = one.veneer.load()(piece, one.params, found)
            steps.append(finish)

        def finished(merged: Tensor) -> Tensor:
            for step in reversed(steps):
                merged = step(merged)
            return merged

        return piece, finished

    return dress
