"""What makes two runs of a study the same study: space, objectives, bounds, and all that scores depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.compose import flat
from harness.config import RunConfig
from studies.objectives import Bound, Objective
from studies.space import Space

Signature = dict[str, str]
_SCORED = (
    "pool", "tasks", "evaluation.split", "evaluation.limit", "adaptation.", "experts", "seed", "veneer",
)  # fmt: skip


def signature(space: Space, objectives: Sequence[Objective], bounds: Sequence[Bound], config: RunConfig) -> Signature:
    """All of it as texts by name."""
    found = {f"space {name}": told for name, told in space.told().items()}
    found |= {f"objective {item.metric}": item.direction for item in objectives}
    found |= {f"constraint {item.name}": f"{item.value:g}" for item in bounds}
    for method, own in space.configs.items():
        searched = {axis.key for axis in space.of(method)} | set(space.fixed.get(method, {}))
        values = {key: value for key, value in flat(own).items() if key.startswith("method.") and key not in searched}
        found |= {f"{method} {key}": value for key, value in values.items()}
    searched = {axis.key for axis in space.axes}
    return found | {
        key: value for key, value in flat(config).items() if key.startswith(_SCORED) and key not in searched
    }


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """How a study differs from what it was, a line each.

    >>> differences({"space method.scale": "[0, 1]", "seed": "0"}, {"space method.scale": "[0, 2]"})
    ['space method.scale: it was [0, 1], it is [0, 2] now', 'seed: it was 0, it is gone']
    """
    lines = [
        f"{name}: it was {was}, it is {now[name]} now" if name in now else f"{name}: it was {was}, it is gone"
        for name, was in before.items()
        if now.get(name) != was
    ]
    return lines + [f"{name}: it is new, {value}" for name, value in now.items() if name not in before]
