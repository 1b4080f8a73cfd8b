"""What the fields of a params dataclass say of themselves: default, range to search, and the checks they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Range:
    """Where a study searches a parameter by default: numbers in [low, high], or one of `choices`."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()
    published: tuple[Any, ...] = ()  # values that papers report besides the default: tried first
    when: tuple[str, Any] | None = None  # another parameter and its value, without which this one does nothing


def tunable(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    step: float | None = None,
    choices: tuple[Any, ...] = (),
    published: tuple[Any, ...] = (),
    when: tuple[str, Any] | None = None,
) -> Any:
    """A dataclass field with a default and the range that studies search; the range bounds nothing else."""
    return field(default=default, metadata={"range": Range(low, high, log, step, choices, published, when)})


def share(default: float, **searched: Any) -> Any:
    """A field like `tunable`, for a share in (0, 1]."""
    made = tunable(default, **searched)
    return field(default=default, metadata={**made.metadata, "share": True})


def word(default: str, *others: str) -> Any:
    """A field for one of a few words."""
    return field(default=default, metadata={"words": (default, *others)})


@dataclass(frozen=True)
class Params:
    """What params dataclasses share: searched numbers and lists are finite, shares in (0, 1], words known."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value, facts = getattr(self, item.name), item.metadata
            if "share" in facts:
                in_unit_interval(item.name, value)
            elif "words" in facts:
                one_of(item.name, value, facts["words"])
            elif value is not None and (isinstance(value, list) or ("range" in facts and not facts["range"].choices)):
                finite(item.name, value)


def in_unit_interval(name: str, value: float) -> None:
    """Refuse a share outside (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} is a share in (0, 1], got {value}; percentages are not accepted")


def shares(name: str, values: Sequence[float] | None) -> None:
    """Refuse a list, one for each expert, with a share outside (0, 1]; None stands for no list."""
    if values is not None:
        finite(name, values)
        for value in values:
            in_unit_interval(name, value)


def at_least(name: str, value: float, least: float) -> None:
    """Refuse a number below `least`, and infinity."""
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be at least {least} and finite, got {value}")


def positive(name: str, value: float) -> None:
    """Refuse a number that is not above zero, and infinity."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def finite(name: str, value: Any) -> None:
    """Refuse anything but a finite number or a non-empty list of them."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, (int, float)) or not math.isfinite(item):
            raise ValueError(f"{name} must be a finite number or a list of them, one for each expert, got {value!r}")
    if not values:
        raise ValueError(f"{name} must not be an empty list")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a word that is not among `known`."""
    if value not in known:
        raise ValueError(f"{name} is one of {', '.join(known)}; got {value!r}")


def per_expert(name: str, value: float | Sequence[float], n_experts: int) -> list[float]:
    """Spread one number over the experts, or check that a list has one number for each.

    Raises:
        ValueError: The list's length is not the number of experts.
    """
    if not isinstance(value, Sequence):
        return [float(value)] * n_experts
    if len(value) != n_experts:
        raise ValueError(
            f"{name} lists {len(value)} numbers for {n_experts} experts; give one for each, or one for all"
        )
    return [float(item) for item in value]
