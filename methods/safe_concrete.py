"""Safety-aware concrete subspaces: a mask that also keeps predictions as they are under the worst universal trigger.

Source: Yang et al. 2024, arXiv:2410.13910 (a concrete mask learnt against a trigger that is looked for on the way), on
Tang et al. 2023, arXiv:2312.06173.
Differs: one mask is learnt, on the sum of both losses, as in FusionBench. The loss under the trigger is the entropy of
predictions there, as in the authors' code, though that is low for a backdoored model too; `penalty=agreement` takes the
cross-entropy with what is predicted without the trigger (on the embedded suite it did more harm). The trigger is one
for each task, found anew before each update on the very batch, by projected gradient ascent within an L1 ball; the
authors' code carries it on, by Adam, without a bound. No pixel is cut to [0, 1], which inputs that are normalised leave
anyway. The penalty holds for the coefficients' updates of `safe_concrete_adamerging` too.
Formula: as concrete's, on L(x) + adv_weight * L'(x + t), t = argmax of the cross-entropy of predictions for x + t with
those for x over ||t||_1 <= trigger_norm * numel(t), L' that cross-entropy, or the entropy
Cost: each step adv_steps + 2 forward and backward passes in the place of one, the rest as concrete's
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.adversary import Adversary
from methods.concrete import (
    Concrete,
    ConcreteAdamergingParams,
    ConcreteCoefficients,
    ConcreteTaskArithmeticParams,
    concrete_adamerging,
    concrete_task_arithmetic,
)
from methods.kinds import Stack
from methods.parameters import word


@dataclass(frozen=True)
class SafeConcreteTaskArithmeticParams(Adversary, ConcreteTaskArithmeticParams):
    """Parameters of `safe_concrete_task_arithmetic`; also the schema of its file in conf/method."""

    # the loss under the trigger: entropy of predictions, or (agreement) their cross-entropy with those made without it
    penalty: str = word("entropy", "agreement")


@dataclass(frozen=True)
class SafeConcreteAdamergingParams(Adversary, ConcreteAdamergingParams):
    """Parameters of `safe_concrete_adamerging`; also the schema of conf/method/safe_concrete_adamerging.yaml."""

    # the loss under the trigger: entropy of predictions, or (agreement) their cross-entropy with those made without it
    penalty: str = word("entropy", "agreement")


def safe_concrete_task_arithmetic(stack: Stack, params: SafeConcreteTaskArithmeticParams) -> Concrete:
    """A mask over the scaled sum of task vectors; what makes it safe is the loss."""
    return concrete_task_arithmetic(stack, params)


def safe_concrete_adamerging(stack: Stack, params: SafeConcreteAdamergingParams) -> ConcreteCoefficients:
    """A mask over AdaMerging; what makes it safe is the loss."""
    return concrete_adamerging(stack, params)
