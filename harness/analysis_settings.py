"""What `crucible analyse` is told; the values stand in conf/analyse."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.config import hold
from methods.parameters import at_least, one_of

SECTION = "analyse"
WEIGHTS = ("cosine", "signs", "norms", "spectra")  # of weights alone
SCORED = ("line", "plane")  # that score models
PARTS = (*WEIGHTS, *SCORED)
BASE, SUM = "base", "sum"  # ends of lines besides the experts; the sum is the base with every expert's change


@dataclass(frozen=True)
class AnalysisSettings:
    """What is looked at."""

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    lines: list[str] = field(default_factory=list)
    points: int = 11
    span: list[float] = field(default_factory=lambda: [0.0, 1.0])
    plane: list[str] = field(default_factory=list)
    plane_points: int = 9
    plane_span: list[float] = field(default_factory=lambda: [-0.25, 1.25])
    rows: int | None = 128

    def __post_init__(self) -> None:
        hold(
            (_some, "parts", self.parts),
            *((one_of, "parts", part, PARTS) for part in self.parts),
            *((_ends, "lines", line) for line in self.lines),
            (at_least, "points", self.points, 2),
            (_span, "span", self.span),
            (_two, "plane", self.plane),
            (at_least, "plane_points", self.plane_points, 2),
            (_span, "plane_span", self.plane_span),
            (at_least, "rows", 1 if self.rows is None else self.rows, 1),
        )


def _some(name: str, values: list[str]) -> None:
    if not values:
        raise ValueError(f"{name} must not be empty; there are {', '.join(PARTS)}")


def _ends(name: str, line: str) -> None:
    first, colon, second = line.partition(":")
    if not first or not colon or not second or first == second:
        raise ValueError(f"{name} are written A:B, two of {BASE}, {SUM} and the experts' names, got {line!r}")


def _two(name: str, experts: list[str]) -> None:
    if experts and (len(experts) != 2 or experts[0] == experts[1]):
        raise ValueError(f"{name} is spanned by two experts, got {', '.join(experts)}")


def _span(name: str, values: list[float]) -> None:
    if len(values) != 2 or not float("-inf") < values[0] < values[1] < float("inf"):
        raise ValueError(f"{name} is [low, high] with low below high, got {values}")
