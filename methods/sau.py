"""Shared adversarial unlearning: retrain a merged model off the mistakes that perturbed inputs make it repeat.

Source: Wei et al. 2023, arXiv:2307.10562, Algorithm 1 and its settings of the ascent; as a defence of merged models:
Yang et al. 2024, arXiv:2410.13910.
Differs: what is defended is task arithmetic's merge of all experts, or one model that was merged before (the pool's
only expert, with scale=1), on the inputs of every task. Ascents are 2.5 / adv_steps of the bound each. FusionBench
learns a mask over the merged change instead of the weights, on one unbounded perturbation for each task.
Formula: w from w0 = base + scale * sum_i v_i by Adam on L(x) - adv_weight * [y0 != y] log(1 - p_w(y0 | x + e)), y0 what
w0 predicts for x + e; e of each example maximises fooling * (CE_w0 + CE_w) / 2 - JS(p_w0, p_w) over |e| <= trigger_norm
Cost: each step 2 adv_steps + 3 forward and adv_steps + 1 backward passes; 6 n numbers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from methods.adamerging import add_slope
from methods.adversary import Adversary, merged
from methods.kinds import Stack
from methods.lazy import torch
from methods.parameters import Params, at_least, positive, tunable, word


@dataclass(frozen=True)
class _Unlearning(Params):
    """What SAU has besides the perturbation."""

    scale: float = tunable(0.3, low=0.0, high=1.0)  # of task arithmetic; 1 for a pool of one merged model
    lr: float = tunable(1e-4, low=1e-6, high=1e-2, log=True)  # Adam's learning rate for the weights
    steps: int = 200  # updates of the weights
    fooling: float = tunable(0.01, low=0.0, high=1.0)  # weight of both models' mistakes beside their agreement
    loss: str = word("labels", "entropy")  # cross-entropy of labels, or entropy with predictions in their place

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("lr", self.lr)
        at_least("steps", self.steps, 1)
        at_least("fooling", self.fooling, 0)


@dataclass(frozen=True)
class SauParams(Adversary, _Unlearning):
    """Parameters of `sau`; also the schema of conf/method/sau.yaml."""

    adv_weight: float = tunable(1.0, low=0.01, high=10.0, log=True)  # of the shared mistakes; 0: no defence
    trigger_norm: float = tunable(0.2, low=0.01, high=1.0, log=True)  # most that a pixel value is changed, as it is fed


class Unlearning:
    """All weights of a merged model; see `methods.kinds.Search`."""

    coefficients = None

    def __init__(self, stack: Stack, params: SauParams) -> None:
        self.groups: list[str] = []
        self.weights = merged(stack, params.scale)
        self.learnt = {f"weight/{name}": tensor for name, tensor in self.weights.items()}
        self.steps, self.rates = params.steps, {"": params.lr}

    def begin(self, step: int, look: Callable[[], float]) -> None:
        """Nothing is drawn."""

    def weight(self, name: str) -> torch.Tensor:
        """As it has been learnt."""
        return self.weights[name].clone()

    def pull(self, name: str, slope: torch.Tensor) -> None:
        """It is the weight itself that is learnt."""
        add_slope(self.weights[name], slope)

    def settle(self) -> None:
        """Nothing is bounded."""

    def finish(self) -> None:
        """Nothing is left to do."""


def sau(stack: Stack, params: SauParams) -> Unlearning:
    """The weights that task arithmetic merges, and what becomes of them."""
    return Unlearning(stack, params)
