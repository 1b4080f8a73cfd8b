"""Every method by its name: the rows that the engine, the configuration, the tests and the listings read."""

from __future__ import annotations

import difflib
from typing import Any

from methods.kinds import Base, Kind, Row, Veneer

_INPUTS, _WITH_HEAD = "unlabelled inputs", "unlabelled inputs, head"


def _row(name: str, paper: str, kind: Kind = Kind.rule, file: str = "", **facts: Any) -> Row:
    """A row whose method and parameters stand in the file of its name, or in the one that its family shares."""
    module = f"methods.{file or name}"
    facts.setdefault("function", f"{module}:{name}")
    facts.setdefault("params", f"{module}:{''.join(word.capitalize() for word in name.split('_'))}Params")
    return Row(name=name, kind=kind, paper=paper, **facts)


_REFERENCES = (
    _row("base", "reference", n_experts=(0, None), members="methods.base:members"),
    _row("expert", "reference", base=Base.unused, ordered=True, members="methods.expert:members"),
)  # fmt: skip

_AVERAGES = (
    _row("simple_average", "arXiv:2203.05482", base=Base.unused),
    _row("weighted_average", "arXiv:2203.05482", base=Base.unused, ordered=True),
)  # fmt: skip

_TASK_VECTORS = (
    _row("task_arithmetic", "arXiv:2212.04089"),
    _row(
        "ties", "arXiv:2306.01708", prepare="methods.ties:thresholds", prepared="methods.ties:prepared",
        unread=("scale", "weights", "disjoint"), kept="methods.ties:magnitudes",
    ),
    _row(
        "dare", "arXiv:2311.03099", random=True, prepare="methods.dare:thresholds", prepared="methods.dare:prepared",
        unread=("scale", "weights", "disjoint"),
    ),
)  # fmt: skip

_GEOMETRY = (
    _row(
        "slerp", "Shoemake 1985", base=Base.optional, ordered=True, n_experts=(1, 2),
        prepare="methods.slerp:coefficients", per_tensor=True,
    ),
)  # fmt: skip

_SPECTRA: tuple[Row, ...] = ()

_INFORMED = (
    _row(
        "fisher", "arXiv:2111.09832", Kind.informed, base=Base.unused, stats="fisher",
        prepare="methods.fisher:weights", prepared="methods.fisher:prepared", data="inputs, head",
    ),
    _row(
        "regmean", "arXiv:2212.09849", Kind.informed, base=Base.unused, stats="gram", elementwise=False, data="inputs",
    ),
)  # fmt: skip

_FOLDS = (
    _row("opcm", "arXiv:2501.09522", Kind.fold, ordered=True, elementwise=False),
)  # fmt: skip

_STRUCTURE = (
    _row("passthrough", "frankenmerging", base=Base.unused, n_experts=(1, 1)),
)  # fmt: skip

_COMPRESSION: tuple[Row, ...] = ()

_LEARNT = (
    _row("adamerging", "arXiv:2310.02575", Kind.search, rule="task_arithmetic", loss="entropy", data=_WITH_HEAD),
)  # fmt: skip

_BUILT = (
    _row("simple_ensemble", "ensemble", Kind.build, base=Base.unused),
    _row("we_moe", "arXiv:2402.00433", Kind.build, loss="entropy", data=_WITH_HEAD),
)  # fmt: skip

FAMILIES: dict[str, tuple[Row, ...]] = {
    "references": _REFERENCES,
    "averages": _AVERAGES,
    "task vectors": _TASK_VECTORS,
    "geometry": _GEOMETRY,
    "spectra": _SPECTRA,
    "informed by data": _INFORMED,
    "one after the other": _FOLDS,
    "structure": _STRUCTURE,
    "compression of experts": _COMPRESSION,
    "learnt coefficients": _LEARNT,
    "built modules": _BUILT,
}

CATALOGUE: dict[str, Row] = {row.name: row for rows in FAMILIES.values() for row in rows}

_VENEERS: tuple[Veneer, ...] = ()

VENEERS: dict[str, Veneer] = {veneer.name: veneer for veneer in _VENEERS}


def find(name: str) -> Row:
    """The row of a method.

    Raises:
        KeyError: No method has that name; the message names the closest.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    closest = difflib.get_close_matches(name, CATALOGUE, n=1)
    hint = f"did you mean {closest[0]}?" if closest else f"known are {', '.join(CATALOGUE)}"
    raise KeyError(f"no method is called {name!r}; {hint}")
