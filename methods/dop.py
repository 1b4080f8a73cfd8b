"""DOP: merge experts one after the other, each linear layer a balance between what is merged and the newcomer.

Source: Yang et al. 2025, "Continual model merging without data: dual projections for balancing stability and
plasticity" (NeurIPS 2025); steps and defaults as in its authors' FusionBench.
Differs: what is no linear layer's weight takes the running mean, each expert counted once, where FusionBench halves the
weight of all before with each newcomer and resets parameters held by modules with children to the base's. A loss that
is zero has no gradient to divide by it.
Formula: Adam from (w + w_t) / 2 on a ||w - x||_P + (1 - a) ||w_t - x||_P, with ||d||_P = ||S U^T d||^2 + ||d V S||^2 of
each one's change U S V^T cut to its leading directions; a by the min-norm combination of both gradients
Cost: each expert and m x n matrix: O(steps m n (m + n)) time, 9 m n + 2 m^2 + 2 n^2 numbers; 3 models in memory
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from methods.adam import Adam
from methods.kinds import Roles
from methods.lazy import torch
from methods.min_norm import min_norm
from methods.parameters import Params, at_least, positive, tunable, word
from methods.spectra import leading

_MARGIN = 1e-3  # neither of the two is ever left without a say, as in the authors' solver


@dataclass(frozen=True)
class DopParams(Params):
    """Parameters of `dop`; also the schema of conf/method/dop.yaml."""

    lr: float = tunable(1e-4, low=1e-5, high=1e-3, log=True)  # Adam's learning rate
    steps: int = 200  # updates for each layer and newcomer, at least 0
    mgda: bool = True  # weigh the two losses by the min-norm combination of their gradients; else by alpha throughout
    alpha: float = tunable(0.8, low=0.0, high=1.0)  # weight of what is merged, in [0, 1]; with mgda where it starts
    ema: float = tunable(0.999, low=0.0, high=0.9999)  # share of the weights before that a step keeps, in [0, 1)
    svd_epsilon: float = tunable(0.99999, low=0.5, high=1.0)  # of the singular values' sum, that is projected on
    space: str = word("uv", "u", "v")  # directions projected on: u (outputs), v (inputs) or uv (both)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("lr", self.lr)
        at_least("steps", self.steps, 0)
        for name, value in (("alpha", self.alpha), ("svd_epsilon", self.svd_epsilon)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a share in [0, 1], got {value}; percentages are not accepted")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is a share in [0, 1), got {self.ema}; 0 takes each step's weights as they are")


def dop(base: Mapping[str, torch.Tensor], params: DopParams, roles: Roles) -> Dop:
    """Start a merge from the base's tensors (float32)."""
    return Dop(base, params, roles)


class Dop:
    """The merged model so far."""

    def __init__(self, base: Mapping[str, torch.Tensor], params: DopParams, roles: Roles) -> None:
        self.base, self.params, self.roles = base, params, roles
        self.merged: dict[str, torch.Tensor] = {}
        self.n_merged = 0

    def update(self, expert: Mapping[str, torch.Tensor]) -> None:
        """Merge one more expert."""
        self.n_merged += 1
        for name, tensor in expert.items():
            if self.n_merged == 1:
                self.merged[name] = tensor.clone()
            elif self.roles.is_linear(name) and tensor.numel():
                self.merged[name] = _balanced(self.base[name], [self.merged[name], tensor], self.params)
            else:
                self.merged[name] += (tensor - self.merged[name]) / self.n_merged

    def result(self) -> dict[str, torch.Tensor]:
        """The merged tensors so far."""
        return dict(self.merged)


class _Loss:
    """How far a weight is from a model's, (m, n), as the leading directions of that model's change see it."""

    def __init__(self, model: torch.Tensor, base: torch.Tensor, params: DopParams) -> None:
        def rank(values: torch.Tensor) -> int:
            return int((values.cumsum(0) < params.svd_epsilon * values.sum()).sum())

        kept = leading((model - base).double(), rank).matrix() * 2**0.5  # so that the gradient needs no factor
        self.model, self.gradient = model, torch.zeros_like(model)
        self.outputs = (kept @ kept.mT).float() if "u" in params.space else None
        self.inputs = (kept.mT @ kept).float() if "v" in params.space else None

    def look(self, x: torch.Tensor) -> float:
        """The loss at x; its gradient is kept."""
        away = x - self.model
        self.gradient.zero_()
        if self.outputs is not None:
            self.gradient.addmm_(self.outputs, away)
        if self.inputs is not None:
            self.gradient.addmm_(away, self.inputs)
        return _inner(away, self.gradient) / 2


def _balanced(base: torch.Tensor, models: list[torch.Tensor], params: DopParams) -> torch.Tensor:
    """Between what is merged and the newcomer, all (m, n)."""
    losses = [_Loss(model, base, params) for model in models]
    weights = [params.alpha, 1 - params.alpha]
    keep = params.ema if params.mgda else 1.0
    x = (models[0] + models[1]) / 2
    adam = Adam(x, params.lr)
    for _ in range(params.steps):
        values = [loss.look(x) for loss in losses]
        if params.mgda:
            found = _pareto([loss.gradient for loss in losses], values)
            weights = [keep * old + (1 - keep) * new for old, new in zip(weights, found, strict=True)]
        adam.step(losses[0].gradient * weights[0] + losses[1].gradient * weights[1])
    return x


def _pareto(gradients: list[torch.Tensor], values: list[float]) -> list[float]:
    """Weights of the min-norm combination of the gradients, each divided by its loss."""
    shares = [1 / value if value > 0 else 0.0 for value in values]
    first, second = gradients
    a, b, c = _inner(first, first), _inner(first, second), _inner(second, second)
    cross = b * shares[0] * shares[1]
    return min_norm([[a * shares[0] ** 2, cross], [cross, c * shares[1] ** 2]], _MARGIN)


def _inner(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))
