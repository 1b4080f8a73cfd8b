"""Every method by its name: the rows that the engine, the configuration, the tests and the listings read."""

from __future__ import annotations

import difflib

from methods.kinds import Base, Kind, Row


def _row(name: str, kind: Kind, paper: str, params: str, **facts) -> Row:
    """A row whose method stands in the file of its name."""
    module = f"methods.{name}"
    facts.setdefault("function", f"{module}:{name}")
    return Row(name=name, kind=kind, paper=paper, params=f"{module}:{params}", **facts)


_ROWS = (
    _row("base", Kind.rule, "reference", "BaseParams", n_experts=(0, None), members="methods.base:members"),
    _row(
        "expert", Kind.rule, "reference", "ExpertParams",
        base=Base.unused, ordered=True, members="methods.expert:members",
    ),
    _row("simple_average", Kind.rule, "arXiv:2203.05482", "SimpleAverageParams", base=Base.unused),
    _row(
        "weighted_average", Kind.rule, "arXiv:2203.05482", "WeightedAverageParams", base=Base.unused, ordered=True,
    ),
    _row("passthrough", Kind.rule, "frankenmerging", "PassthroughParams", base=Base.unused, n_experts=(1, 1)),
    _row("task_arithmetic", Kind.rule, "arXiv:2212.04089", "TaskArithmeticParams"),
    _row(
        "ties", Kind.rule, "arXiv:2306.01708", "TiesParams",
        prepare="methods.ties:thresholds", prepared="methods.ties:prepared",
        unread=("scale", "weights", "disjoint"), kept="methods.ties:magnitudes",
    ),
    _row(
        "dare", Kind.rule, "arXiv:2311.03099", "DareParams", random=True,
        prepare="methods.dare:thresholds", prepared="methods.dare:prepared",
        unread=("scale", "weights", "disjoint"),
    ),
    _row(
        "slerp", Kind.rule, "Shoemake 1985", "SlerpParams",
        base=Base.optional, ordered=True, n_experts=(1, 2), prepare="methods.slerp:coefficients", per_tensor=True,
    ),
    _row(
        "fisher", Kind.informed, "arXiv:2111.09832", "FisherParams",
        base=Base.unused, stats="fisher", prepare="methods.fisher:weights", prepared="methods.fisher:prepared",
        data="inputs, head",
    ),
    _row(
        "regmean", Kind.informed, "arXiv:2212.09849", "RegmeanParams",
        base=Base.unused, stats="gram", elementwise=False, data="inputs",
    ),
    _row(
        "adamerging", Kind.search, "arXiv:2310.02575", "AdamergingParams",
        rule="task_arithmetic", loss="entropy", data="unlabelled inputs, head",
    ),
    _row("opcm", Kind.fold, "arXiv:2501.09522", "OpcmParams", ordered=True, elementwise=False),
    _row("simple_ensemble", Kind.build, "ensemble", "SimpleEnsembleParams", base=Base.unused),
    _row("we_moe", Kind.build, "arXiv:2402.00433", "WeMoeParams", loss="entropy", data="unlabelled inputs, head"),
)  # fmt: skip

CATALOGUE: dict[str, Row] = {row.name: row for row in _ROWS}


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
