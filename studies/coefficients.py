"""Merging coefficients at four granularities, as the numbers, lists and schedules that the configuration takes.

global        one number: `scale`
expert        one for each expert: `weights`
layer         one for each depth, or a curve through a few knots: `scale` as a schedule
expert_layer  for each expert one for each depth, or a curve: `weights`, each a schedule
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from harness.config import RunConfig
from studies.settings import StudySettings


@dataclass(frozen=True)
class Depth:
    """What a model has of depths: blocks, and whether anything lies before and after them."""

    before: bool
    blocks: int
    after: bool

    @property
    def places(self) -> list[str]:
        """The depths by name: `layer 0` lies before the blocks, `layer 1` is the first of them."""
        first, last = (0 if self.before else 1), self.blocks + (1 if self.after else 0)
        return [f"layer {layer}" for layer in range(first, last + 1)]


@dataclass(frozen=True)
class Coefficients:
    """How the coefficients of one method are laid out."""

    key: str  # method.scale or method.weights
    experts: tuple[str, ...]  # (); or the experts that have their own
    places: tuple[str, ...]  # (); or the depths, or the knots
    depth: Depth | None  # where `places` are depths
    fixed: Mapping[str, Any]  # what else they determine
    default: Any = None
    prefix: str = "method."

    @property
    def names(self) -> list[str]:
        """The axes' names."""
        head = self.prefix + self.key.removeprefix("method.")
        heads = [f"{head}/{expert}" for expert in self.experts] or [head]
        return [f"{one}/{place}" for one in heads for place in self.places] if self.places else heads

    def under(self, prefix: str) -> Coefficients:
        """The same, named for one method of several."""
        return replace(self, prefix=prefix)

    def value(self, found: Mapping[str, Any]) -> Any:
        """What stands under the key for one number on each axis."""
        numbers = [float(found[name]) for name in self.names]
        if not self.experts:
            return self._over_depth(numbers) if self.places else numbers[0]
        if not self.places:
            return numbers
        n = len(self.places)
        return [self._over_depth(numbers[start : start + n]) for start in range(0, len(numbers), n)]

    def _over_depth(self, numbers: list[float]) -> list[Any]:
        if self.depth is None:
            return numbers
        rest = list(numbers)
        entries: list[Any] = [{"at": "before", "value": rest.pop(0)}] if self.depth.before else []
        last: list[Any] = [{"at": "after", "value": rest.pop()}] if self.depth.after else []
        return [*entries, {"at": "blocks", "value": rest}, *last] if rest else [*entries, *last]


def needs_depth(settings: StudySettings) -> bool:
    """Whether the axes depend on how many layers the models have."""
    return settings.coefficients in ("layer", "expert_layer") and settings.knots is None


def coefficients_of(
    settings: StudySettings, config: RunConfig, depth: Depth | None, faults: list[str]
) -> Coefficients | None:
    """The layout that a study asks for; None where it asks for none, or for one number, which `scale` is already."""
    granularity = settings.coefficients
    if granularity is None:
        return None
    per_expert = granularity in ("expert", "expert_layer")
    name = "weights" if per_expert else "scale"
    params = config.method
    if name not in {item.name for item in fields(params)}:
        faults.append(f"study.coefficients={granularity}: {config.method_name} has no {name}; choose another method")
        return None
    low, high = settings.coefficient_range["low"], settings.coefficient_range["high"]
    if low > high:
        faults.append(f"study.coefficient_range: low {low} is above high {high}; exchange them")
        return None
    knots = tuple(f"knot {index + 1}" for index in range(settings.knots)) if settings.knots else ()
    places = knots or (tuple(depth.places) if depth is not None else ())
    if granularity in ("global", "expert"):
        places = ()
    scale = getattr(params, "scale", None)
    fixed = {"method.scale": 1.0} if per_expert and scale is not None else {}
    return Coefficients(
        f"method.{name}",
        tuple(config.pool.experts) if per_expert else (),
        places,
        depth if not knots and places else None,
        fixed,
        scale if isinstance(scale, int | float) else None,
    )
