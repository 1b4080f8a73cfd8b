"""LoraHub: search the experts' coefficients for the least loss on a few labelled examples, without gradients.

Source: Huang et al. 2023, arXiv:2307.13269, section 3; bounds, start and L1 weight as in the authors' code.
Differs: the experts' changes are summed, so that they need not be adapters; the paper sums the two factors of low-rank
adapters each for itself, which mixes every factor with every other. CMA-ES, as the paper; the authors' code lets
Nevergrad choose a search. The mean size of the coefficients is penalised, as in the code; the paper has the sum. The
point with the least loss of all is kept, the start among them.
Formula: merged = base + sum_i w_i (expert_i - base), w = argmin loss(w) + l1 * mean |w_i|, w_i in [-bound, bound]
Cost: steps forward passes over all examples and O(T n) each; (T + 2) n numbers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from methods.lazy import torch
from methods.ledger import Ledger
from methods.parameters import Params, at_least, finite, positive, tunable, word

if TYPE_CHECKING:
    from torch import Tensor


class Sampler(Protocol):
    """A search without gradients: it is told how good points are, and asked for the next."""

    @property
    def population(self) -> int:
        """How many points are asked for before their losses are told."""
        ...

    def ask(self) -> Tensor:
        """A point, (N,) float32."""
        ...

    def tell(self, points: Sequence[Tensor], losses: Sequence[float]) -> None:
        """The losses of what was asked for."""
        ...


@dataclass(frozen=True)
class LorahubParams(Params):
    """Parameters of `lorahub`; also the schema of conf/method/lorahub.yaml."""

    granularity: str = word("task", "layer")  # what has coefficients of its own: the model, as in the paper, or a block
    scale: float = tunable(0.0, low=0.0, high=1.0)  # where every coefficient starts
    bound: float = tunable(1.5, low=0.5, high=2.0)  # coefficients stay in [-bound, bound]
    spread: float = tunable(0.5, low=0.05, high=1.0)  # deviation of the first points from the start
    l1: float = tunable(0.05, low=0.0, high=0.5)  # weight of the mean size of the coefficients in the loss
    steps: int = 40  # evaluations

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("bound", self.bound)
        positive("spread", self.spread)
        at_least("l1", self.l1, 0)
        at_least("steps", self.steps, 1)
        finite("scale", self.scale)
        if abs(self.scale) > self.bound:
            raise ValueError(f"scale lies in [-bound, bound] = [{-self.bound}, {self.bound}], got {self.scale}")

    def evaluations(self, n_experts: int) -> int:
        """How often the loss is asked for."""
        return self.steps


def lorahub(
    shape: tuple[int, int],
    objective: Callable[..., tuple[float, torch.Tensor]],
    params: LorahubParams,
    report: Callable[[int, float, torch.Tensor], None],
    *,
    sampler: Callable[[Sequence[float], float, float], Sampler],
) -> torch.Tensor:
    """Find the coefficients, (groups, T); arguments and errors as `adamerging`'s.

    Args:
        shape: Number of groups and of experts.
        objective: Coefficients -> loss on all examples; its gradient is left alone.
        params: See LorahubParams.
        report: Called after each evaluation.
        sampler: (start, spread, bound) -> a search around the start within [-bound, bound].
    """
    start = torch.full(shape, params.scale, dtype=torch.float32)
    ledger = Ledger(objective, report, "a smaller bound may help")

    def loss_of(point: torch.Tensor) -> float:
        return ledger(point.reshape(shape), penalty=params.l1 * float(point.abs().mean()), slope=False)[0]

    loss_of(start)
    drawn = sampler(start.flatten().tolist(), params.spread, params.bound)
    points: list[torch.Tensor] = []
    losses: list[float] = []
    for _ in range(params.steps - 1):
        points.append(drawn.ask())
        losses.append(loss_of(points[-1]))
        if len(points) == drawn.population:
            drawn.tell(points, losses)
            points, losses = [], []
    return ledger.best
