"""Adversarial weight masking: shrink those weights of a merged model that a universal trigger works through.

Source: Chai & Chen 2022, arXiv:2207.04497, equation 4; as a defence of merged models: Yang et al. 2024,
arXiv:2410.13910.
Differs: what is defended is task arithmetic's merge of all experts, or one model that was merged before (the pool's
only expert, with scale=1), on the inputs of every task. The penalty on the masks' sum is a step of lr * sparsity
down after each of Adam's, so that it is no part of the loss reported. The trigger is one for each task. FusionBench
learns concrete's mask over the merged change under this name: that is `safe_concrete_task_arithmetic` here.
Formula: merged = m * w, w = base + scale * sum_i v_i, m in [0, 1] and 1 at first, of linear layers' weights, by Adam on
L(x) + adv_weight * L(x + t) + sparsity * sum(m), t as safe concrete's
Cost: each step adv_steps + 2 forward and backward passes; 5 n numbers
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
class _Shrinking(Params):
    """What AWM has besides the trigger."""

    scale: float = tunable(0.3, low=0.0, high=1.0)  # of task arithmetic; 1 for a pool of one merged model
    lr: float = tunable(1e-2, low=1e-4, high=1e-1, log=True)  # Adam's learning rate for the mask
    steps: int = 200  # updates of the mask
    sparsity: float = tunable(0.0, low=0.0, high=1.0)  # how much of lr every mask falls in each update, at least 0
    loss: str = word("labels", "entropy")  # cross-entropy of labels, or entropy with predictions in their place

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("lr", self.lr)
        at_least("steps", self.steps, 1)
        at_least("sparsity", self.sparsity, 0)


@dataclass(frozen=True)
class AwmParams(Adversary, _Shrinking):
    """Parameters of `awm`; also the schema of conf/method/awm.yaml."""

    adv_weight: float = tunable(1.0, low=0.01, high=10.0, log=True)  # of the loss under the trigger; 0: no defence


class Masked:
    """Soft masks on a merged model's linear layers; see `methods.kinds.Search`."""

    coefficients = None

    def __init__(self, stack: Stack, params: AwmParams) -> None:
        self.groups: list[str] = []
        self.whole, self.fall = merged(stack, params.scale), params.lr * params.sparsity
        linear = [name for name, place in stack.places.items() if place.linear or place.transposed]
        if not linear:
            raise ValueError("awm masks the weights of linear layers, and none of those that are merged is one")
        self.masks = {name: torch.ones_like(self.whole[name]) for name in linear}
        self.learnt = {f"mask/{name}": mask for name, mask in self.masks.items()}
        self.steps, self.rates = params.steps, {"": params.lr}

    def begin(self, step: int, look: Callable[[], float]) -> None:
        """Nothing is drawn."""

    def weight(self, name: str) -> torch.Tensor:
        """What the mask leaves."""
        return self.whole[name] * self.masks[name] if name in self.masks else self.whole[name].clone()

    def pull(self, name: str, slope: torch.Tensor) -> None:
        """The mask's is the weight's by the weight."""
        if name in self.masks:
            add_slope(self.masks[name], slope * self.whole[name])

    def settle(self) -> None:
        """Back into [0, 1]."""
        for mask in self.masks.values():
            mask.sub_(self.fall).clamp_(0, 1)

    def finish(self) -> None:
        """Nothing is left to do."""


def awm(stack: Stack, params: AwmParams) -> Masked:
    """Masks on what task arithmetic merges."""
    return Masked(stack, params)
