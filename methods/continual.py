"""Running merges: what averaging, task arithmetic and TIES come to when experts arrive one after the other.

Source: Wortsman et al. 2022, arXiv:2203.05482 (average); Ilharco et al. 2023, arXiv:2212.04089 (task arithmetic); Yadav
et al. 2023, arXiv:2306.01708 (TIES); all three as baselines of continual merging: Tang et al. 2025, arXiv:2501.09522.
Differs: average and task arithmetic are those of all experts at once, roundings aside. TIES keeps for each entry the
sum of the changes that agree so far and their number: a newcomer is trimmed over the model, its change and that sum
elect a sign, and what does not have it is forgotten. For two experts that is `ties`, for more where no vote turns.
FusionBench adds scale * TIES(merged change, newcomer) onto the already merged model, which counts what was merged again
with every expert and drifts away; it also trims what was merged again, which forgets the early experts.
Formula: average: w += (w_t - w) / t; task arithmetic: x += delta_t, merged = base + scale * x;
TIES: s = what agrees of s and trim(delta_t), merged = base + scale * s / (how many agree)
Cost: each expert: O(n) time; 2 models in memory for the average, 3 for task arithmetic, 5 for TIES
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from methods.kinds import Roles
from methods.lazy import torch
from methods.parameters import Params, share, tunable, word
from methods.primitives import keep_above
from methods.selection import kth_largest

State = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class ContinualAverageParams:
    """Parameters of `continual_average`: none; also the schema of conf/method/continual_average.yaml."""


@dataclass(frozen=True)
class ContinualTaskArithmeticParams(Params):
    """Parameters of `continual_task_arithmetic`; also the schema of conf/method/continual_task_arithmetic.yaml."""

    scale: float = tunable(0.3, low=0.0, high=1.0)  # multiplies the sum of the task vectors


@dataclass(frozen=True)
class ContinualTiesParams(Params):
    """Parameters of `continual_ties`; also the schema of conf/method/continual_ties.yaml."""

    density: float = share(0.2, low=0.05, high=1.0)  # share of a newcomer's change kept, over the model, in (0, 1]
    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change
    disjoint: str = word("mean", "sum")  # how what agrees merges: mean over experts, or sum


class _Average:
    """The mean of the experts so far."""

    def __init__(self) -> None:
        self.merged: dict[str, torch.Tensor] = {}
        self.n_merged = 0

    def update(self, expert: State) -> None:
        self.n_merged += 1
        for name, tensor in expert.items():
            if self.n_merged == 1:
                self.merged[name] = tensor.clone()
            else:
                self.merged[name] += (tensor - self.merged[name]) / self.n_merged

    def result(self) -> dict[str, torch.Tensor]:
        return dict(self.merged)


class _TaskArithmetic:
    """The sum of the task vectors so far."""

    def __init__(self, base: State, params: ContinualTaskArithmeticParams) -> None:
        self.base, self.params = base, params
        self.total = {name: torch.zeros_like(tensor) for name, tensor in base.items()}

    def update(self, expert: State) -> None:
        for name, tensor in expert.items():
            self.total[name] += tensor - self.base[name]

    def result(self) -> dict[str, torch.Tensor]:
        return {name: self.base[name] + self.params.scale * delta for name, delta in self.total.items()}


class _Ties:
    """For each entry the sum of the changes that agree so far, and how many they are."""

    def __init__(self, base: State, params: ContinualTiesParams) -> None:
        self.base, self.params = base, params
        self.total = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
        self.votes = {name: torch.zeros_like(tensor) for name, tensor in base.items()}

    def update(self, expert: State) -> None:
        deltas = {name: expert[name] - self.base[name] for name in expert}
        threshold = _threshold(deltas, self.params.density)
        for name, delta in deltas.items():
            own = delta if threshold is None else keep_above(delta[None], threshold)[0]
            before = self.total[name]
            elected = (before + own).sign_()
            stays, joins = (before * elected).relu_(), (own * elected).relu_()  # magnitudes of what agrees
            self.votes[name].mul_(stays.sign()).add_(joins.sign())
            self.total[name] = stays.add_(joins).mul_(elected)

    def result(self) -> dict[str, torch.Tensor]:
        merged = {}
        for name, total in self.total.items():
            votes = self.votes[name].clamp(min=1) if self.params.disjoint == "mean" else 1.0
            merged[name] = self.base[name] + self.params.scale * (total / votes)
        return merged


def continual_average(base: State, params: ContinualAverageParams, roles: Roles) -> _Average:
    """Start a running mean; the base takes no part."""
    return _Average()


def continual_task_arithmetic(base: State, params: ContinualTaskArithmeticParams, roles: Roles) -> _TaskArithmetic:
    """Start a running sum of task vectors from the base's tensors (float32)."""
    return _TaskArithmetic(base, params)


def continual_ties(base: State, params: ContinualTiesParams, roles: Roles) -> _Ties:
    """Start a running TIES merge from the base's tensors (float32)."""
    return _Ties(base, params)


def _threshold(deltas: State, density: float) -> torch.Tensor | None:
    """Smallest magnitude that is kept over the whole change, (1,); None where all is."""
    if density == 1 or not any(delta.numel() for delta in deltas.values()):
        return None

    def walk(function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Iterable[Any]:
        return [function(delta.reshape(1, -1)[:, :limit]) for delta in deltas.values()]

    return kth_largest(walk, density)
