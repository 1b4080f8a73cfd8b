"""PWE-MoE: feed-forward blocks mixed by what a preference over tasks asks for, learnt for all preferences at once.

Source: Tang et al. 2024, arXiv:2406.09770, Algorithm 1; `epo`: Mahapatra & Rajan 2020, "Multi-task learning with user
preferences" (ICML), Algorithm 1 and equations 14 and 24.
Differs: only feed-forward blocks are mixed (the paper's variant "MLP only"); preferences are drawn evenly from the
simplex. Where r_i loss_i are equal, the exact method lowers losses in its relaxed form; where its linear program has
no answer, the preference itself weighs the losses.
Formula: base + sum_i gate_i(r) delta_i in feed-forward blocks, base + scale * sum_i delta_i elsewhere; minimised is
sum_i r_i loss_i, or with `epo` the losses along the direction that makes all r_i loss_i equal
Cost: T + 1 copies of the feed-forward blocks; each step T forward and backward passes, and a small linear program
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from methods.lazy import torch
from methods.lessons import Lesson
from methods.parameters import Params, at_least, positive, tunable, word

if TYPE_CHECKING:
    from methods.routed import Parts

_BALANCED = 1e-4  # a divergence from equal r_i loss_i below this is none


@dataclass(frozen=True)
class PweMoeParams(Params):
    """Parameters of `pwe_moe`; also the schema of conf/method/pwe_moe.yaml."""

    by: str = word("scalarization", "epo")  # sum of losses weighed by the preference, or exactly Pareto optimal
    preference: list[float] | None = None  # one for each expert, of the model that is made; None: all the same
    scale: float = tunable(0.3, low=0.0, high=1.0)  # of task arithmetic, and what each gate starts from
    lr: float = tunable(1e-2, low=1e-5, high=1e-1, log=True)  # Adam's learning rate for the routers
    steps: int = 2000  # updates

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("lr", self.lr)
        at_least("steps", self.steps, 1)
        if self.preference is not None and (min(self.preference) < 0 or sum(self.preference) <= 0):
            raise ValueError(f"preference has numbers of at least 0, some above, got {self.preference}")


def pwe_moe(
    base: torch.nn.Module, experts: Sequence[torch.nn.Module], params: PweMoeParams, roles: Parts
) -> torch.nn.Module:
    """The base module with merged weights; `preference.set_to([...])` of it says which trade-off it makes.

    Raises:
        ValueError: The architecture has no feed-forward blocks that the pool can name, or the preference has not as
            many numbers as there are experts.
    """
    from methods.mixed_linear import Dense
    from methods.routed import Preference, Preferred, Router, network, route

    wanted = Preference(len(experts))
    wanted.set_to(params.preference)

    def entry(block, held, tokens, causal, masked, width):
        n = len(experts)
        return Preferred(block, Router(network(n, n, 2, params.scale, 2 * n), n), held, wanted)

    made: Any = route(base, experts, roles, "pwe_moe", params.scale, Dense, entry)
    made.uncached = False  # gates do not depend on tokens
    made.preference, made.lesson = wanted, Trading(params)
    return made


class Trading(Lesson):
    """Labelled losses of all tasks under a preference that is drawn anew each step."""

    def __init__(self, params: PweMoeParams) -> None:
        self.params, self.drawn = params, torch.ones(0)

    def begin(self, module: Any, generator: torch.Generator) -> None:
        """Draw a preference, evenly from the simplex."""
        waits = -torch.rand(len(module.preference.shares), generator=generator).clamp(min=1e-30).log()
        self.drawn = waits / waits.sum()
        module.preference.set_to(self.drawn.tolist())

    def weigh(self, losses: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """By the preference, or by what follows of it."""
        if self.params.by == "scalarization":
            return self.drawn.to(losses)
        wide = gradients.double()
        found = exact_weights(losses.double().cpu().numpy(), (wide @ wide.T).cpu().numpy(), self.drawn.double().numpy())
        return torch.from_numpy(found).to(losses)

    def finish(self, module: Any) -> None:
        """Back to the preference that was asked for."""
        module.preference.set_to(self.params.preference)


def exact_weights(losses: np.ndarray, products: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """Weights of the tasks' gradients whose combination makes r_i loss_i equal, or, where they are, lowers all losses.

    Args:
        losses: Of each task, (T,), at least 0.
        products: Inner products of the tasks' gradients, (T, T).
        preference: r, (T,), above 0.
    """
    weighed = preference * losses
    products = products / max(np.abs(products).max(), 1e-300)
    if weighed.sum() <= 0:
        return preference
    shares = np.maximum(weighed / weighed.sum(), 1e-300)
    divergence = float((shares * np.log(shares * len(shares))).sum())
    anchor = preference * (np.log(shares * len(shares)) - divergence)
    moves = products @ anchor  # of each task's gradient, how much it balances
    found: np.ndarray | None
    if divergence <= _BALANCED:
        found = best_mixture(products.sum(0), products, np.zeros(len(losses)))
    else:
        worst = weighed >= weighed.max()
        helps = moves > 0
        rows = worst | ~helps if helps.any() else np.ones_like(helps)
        least = np.where(worst | (not helps.any()), 0.0, moves)
        found = best_mixture(moves, products[rows], least[rows])
    return preference if found is None else found


def best_mixture(gains: np.ndarray, rows: np.ndarray, least: np.ndarray) -> np.ndarray | None:
    """The mixture w with the largest gains @ w of those with rows @ w >= least; None where there is none.

    Args:
        gains: What each part is worth, (n,).
        rows: Constraints, (m, n).
        least: What each must come to, (m,).

    >>> best_mixture(np.array([1.0, 2.0]), np.array([[1.0, 0.0]]), np.array([0.25])).tolist()
    [0.25, 0.75]
    """
    from scipy.optimize import linprog  # half a second, for the exact method alone

    n = len(gains)
    found = linprog(-gains, -rows.reshape(-1, n), -least, np.ones((1, n)), [1.0], bounds=(0, None), method="highs")
    return found.x if found.status == 0 else None
