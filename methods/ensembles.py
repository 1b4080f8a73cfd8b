"""Ensembles: all experts answer, and their outputs are averaged, weighted, or of each logit the largest is taken.

Source: Lakshminarayanan et al. 2017, arXiv:1612.01474 (averaging), here over fine-tuned experts; FusionBench for the
weighted mean and the largest logit (`max_model_predictor`).
Differs: the modules' outputs are combined, which for the mean of zero-shot classifiers is that of the logits; the
largest is taken of logits there too, not of embeddings. A language model's next token is that of all together.
Formula: logits(x) = sum_i w_i logits_i(x), w_i = 1/T if not given; or max_i logits_i(x)
Cost: no time to build, T models in memory, T forward passes for each input; a continuation keeps no cache
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.parameters import Params, finite, per_expert

if TYPE_CHECKING:
    from torch import nn

    from methods.routed import Parts


@dataclass(frozen=True)
class SimpleEnsembleParams:
    """`simple_ensemble` has no parameters."""


@dataclass(frozen=True)
class MaxModelPredictorParams:
    """`max_model_predictor` has no parameters."""


@dataclass(frozen=True)
class WeightedEnsembleParams(Params):
    """Parameters of `weighted_ensemble`; also the schema of conf/method/weighted_ensemble.yaml."""

    weights: list[float] | None = None  # one for each expert; None for equal ones
    normalize: bool = True  # divide the weights by their sum

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            finite("weights", self.weights)
            if self.normalize and math.fsum(self.weights) == 0:
                raise ValueError(f"weights sum to 0 and cannot be normalized, got {self.weights}; use normalize=false")


def simple_ensemble(
    base: nn.Module | None, experts: Sequence[nn.Module], params: SimpleEnsembleParams, roles: Parts
) -> nn.Module:
    """A module that holds all experts, T times one expert's size, and gives the mean of their outputs."""
    from methods.mixtures import Ensemble

    return Ensemble(experts)


def weighted_ensemble(
    base: nn.Module | None, experts: Sequence[nn.Module], params: WeightedEnsembleParams, roles: Parts
) -> nn.Module:
    """A module that holds all experts and gives the sum of their outputs, each multiplied by its weight.

    Raises:
        ValueError: The number of weights is not that of experts.
    """
    from methods.mixtures import Ensemble

    weights = per_expert("weights", 1.0 if params.weights is None else params.weights, len(experts))
    total = math.fsum(weights) if params.normalize else 1.0
    return Ensemble(experts, weights=[weight / total for weight in weights])


def max_model_predictor(
    base: nn.Module | None, experts: Sequence[nn.Module], params: MaxModelPredictorParams, roles: Parts
) -> nn.Module:
    """A module that holds all experts and gives of each logit the largest."""
    from methods.mixtures import Ensemble

    return Ensemble(experts, "max")
