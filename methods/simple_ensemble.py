"""Simple ensemble: all experts answer, their outputs are averaged.

Source: Lakshminarayanan et al. 2017, arXiv:1612.01474 (averaging), here over fine-tuned experts.
Differs: the modules' outputs are averaged, which for zero-shot classifiers is the mean of the logits.
Formula: output(x) = 1/T sum_i output_i(x)
Cost: no time to build, T models in memory, T forward passes for each input
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from methods.kinds import Roles


@dataclass(frozen=True)
class SimpleEnsembleParams:
    """`simple_ensemble` has no parameters."""


def simple_ensemble(
    base: nn.Module | None, experts: Sequence[nn.Module], params: SimpleEnsembleParams, roles: Roles
) -> nn.Module:
    """A module that holds all experts, T times one expert's size, and gives the mean of their outputs."""
    from methods.mixtures import Ensemble

    return Ensemble(experts)
