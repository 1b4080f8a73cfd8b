"""What defences against backdoors have in common: the parameters of the trigger they look for, and what they defend."""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Stack
from methods.lazy import torch
from methods.parameters import Params, at_least, positive, tunable


@dataclass(frozen=True)
class Adversary(Params):
    """Of the trigger; a mixin that stands before the method's other parameters."""

    adv_weight: float = tunable(0.1, low=0.01, high=10.0, log=True)  # of the loss under the trigger; 0: no defence
    adv_steps: int = 5  # ascents to the trigger before each update, from an empty one, at least 1
    trigger_norm: float = tunable(0.1, low=0.01, high=1.0, log=True)  # how far it changes a pixel value as it is fed

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("adv_weight", self.adv_weight, 0)
        at_least("adv_steps", self.adv_steps, 1)
        positive("trigger_norm", self.trigger_norm)


def merged(stack: Stack, scale: float) -> dict[str, torch.Tensor]:
    """Task arithmetic's weights, which a defence starts from; with one expert and scale 1, that expert's."""
    scales = torch.full((stack.n_experts,), float(scale), device=stack.device)
    return {name: base + stack.change(name, scales) for name, base in stack.base.items()}
