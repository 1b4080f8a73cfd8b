"""One parameter of Optuna, and what its values stand for in the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution


@dataclass(frozen=True)
class Axis:
    """One parameter of Optuna."""

    name: str
    key: str  # of the configuration
    distribution: BaseDistribution
    method: str | None = None  # the method that it belongs to, where several are searched
    values: tuple[Any, ...] = ()  # what the labels of a category stand for
    default: Any = None  # as the configuration has it; None where it has nothing in the range

    def meant(self, found: Any) -> Any:
        """What a value of Optuna's stands for."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.values[self.distribution.choices.index(found)]
        return found

    def label(self, value: Any) -> Any:
        """Optuna's value for what it stands for; None where it is outside the axis."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.distribution.choices[self.values.index(value)] if value in self.values else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        own = self.distribution
        assert isinstance(own, FloatDistribution | IntDistribution)
        return value if own.low <= value <= own.high else None

    def ends(self) -> list[Any]:
        """Both ends and the middle, or every choice."""
        own = self.distribution
        if isinstance(own, CategoricalDistribution):
            return list(self.values)
        assert isinstance(own, FloatDistribution | IntDistribution)
        middle = math.sqrt(own.low * own.high) if own.log else (own.low + own.high) / 2
        if own.step is not None:
            middle = own.low + round((middle - own.low) / own.step) * own.step
        return list(dict.fromkeys([own.low, middle, own.high]))


def suggest(trial: Any, axis: Axis) -> None:
    """Have Optuna choose a value."""
    own = axis.distribution
    if isinstance(own, CategoricalDistribution):
        trial.suggest_categorical(axis.name, own.choices)
    elif isinstance(own, IntDistribution):
        trial.suggest_int(axis.name, own.low, own.high, step=own.step, log=own.log)
    else:
        assert isinstance(own, FloatDistribution)
        trial.suggest_float(axis.name, own.low, own.high, step=own.step, log=own.log)


def in_words(axis: Axis) -> str:
    """An axis in words."""
    own = axis.distribution
    if isinstance(own, CategoricalDistribution):
        return "one of " + ", ".join(map(str, own.choices))
    assert isinstance(own, FloatDistribution | IntDistribution)
    stepped = own.step is not None and (isinstance(own, FloatDistribution) or own.step != 1)
    return f"[{own.low}, {own.high}]" + (", logarithmic" if own.log else "") + (f", step {own.step}" if stepped else "")
