"""AdaMerging: learn the coefficients of task vectors by minimising the entropy of predictions on unlabelled inputs.

Source: Yang et al. 2024, arXiv:2310.02575, equations 3 to 6; AdaMerging++ (`adamerging_plus`): the same on task
vectors that TIES (Yadav et al. 2023, arXiv:2306.01708) has trimmed and of which only what has the elected sign is left.
Differs: nothing with granularity=tensor, which is what the authors' code calls layer-wise (every parameter tensor has
its own coefficients); granularity=layer gives one set to each block, granularity=task one set to the model. `clamp`
brings coefficients back to [0, 1] after a step, where the authors' code cuts them in the merge and so stops their
gradient. loss=labels (the cross-entropy of classes or next tokens) and conflicts=mgda (Sener & Koltun 2018,
arXiv:1810.04650, in the place of the sum of the tasks' losses) are not of the paper.
Formula: merged = base + sum_i c_gi v_i, v_i = expert_i - base, c of each group g by Adam on the predictions' entropy
Cost: each step: the merge and its gradient, O(T n), and one forward and backward pass of the model; (T + 3) n numbers,
3 n where the vectors are read from files at each step (adaptation.task_vectors)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from methods.kinds import Place, Stack
from methods.lazy import torch
from methods.parameters import Params, at_least, positive, share, tunable, word
from methods.primitives import elect, keep_above
from methods.selection import kth_largest


@dataclass(frozen=True)
class AdamergingParams(Params):
    """Parameters of `adamerging`; also the schema of conf/method/adamerging.yaml."""

    granularity: str = word("tensor", "layer", "task")  # what has coefficients of its own: task is the whole model
    scale: float = tunable(0.3, low=0.0, high=1.0)  # where every coefficient starts
    lr: float = tunable(1e-3, low=1e-4, high=1e-1, log=True)  # Adam's learning rate
    steps: int = 500  # updates
    clamp: bool = False  # hold the coefficients in [0, 1]
    loss: str = word("entropy", "labels")  # entropy of predictions, or cross-entropy of labels or next tokens
    conflicts: str = word("sum", "mgda")  # the tasks' gradients: their sum, or the least norm's combination

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("lr", self.lr)
        at_least("steps", self.steps, 1)


@dataclass(frozen=True)
class AdamergingPlusParams(AdamergingParams):
    """Parameters of `adamerging_plus`; also the schema of conf/method/adamerging_plus.yaml."""

    density: float = share(0.2, low=0.05, high=1.0)  # share of each expert's change kept, over the model, in (0, 1]


class Coefficients:
    """Coefficients of stacked vectors, one set for each group of tensors; see `methods.kinds.Search`."""

    def __init__(self, stack: Stack, params: AdamergingParams) -> None:
        self.stack, self.clamp, self.steps, self.rates = stack, params.clamp, params.steps, {"": params.lr}
        self.groups, self.group_of = grouped(params.granularity, stack.places)
        self.values = torch.full((len(self.groups), stack.n_experts), float(params.scale), device=stack.device)
        self.learnt = {"coefficients": self.values}

    @property
    def coefficients(self) -> torch.Tensor:
        """(groups, T)."""
        return self.values

    def begin(self, step: int, look: Callable[[], float]) -> None:
        """Nothing is drawn."""

    def weight(self, name: str) -> torch.Tensor:
        """The base and the change, in one pass over the vectors."""
        return self.change(name).add_(self.stack.base[name])

    def change(self, name: str) -> torch.Tensor:
        """sum_i c_i v_i, (*shape)."""
        return self.stack.change(name, self.values[self.group_of[name]])

    def pull(self, name: str, slope: torch.Tensor) -> None:
        """The merge is linear in the coefficients: inner products of the weights' gradient with the vectors."""
        self._slopes()[self.group_of[name]] += self.stack.products(name, slope)

    def _slopes(self) -> torch.Tensor:
        """The coefficients' gradient so far, (groups, T)."""
        if self.values.grad is None:
            self.values.grad = torch.zeros_like(self.values)
        return self.values.grad

    def settle(self) -> None:
        """Hold them in [0, 1], where that is asked for."""
        if self.clamp:
            self.values.clamp_(0, 1)

    def finish(self) -> None:
        """Nothing is left to do."""


def adamerging(stack: Stack, params: AdamergingParams) -> Coefficients:
    """Coefficients of the task vectors as they are."""
    return Coefficients(stack, params)


def adamerging_plus(stack: Stack, params: AdamergingPlusParams) -> Coefficients:
    """Coefficients of what TIES leaves of the task vectors."""
    if params.density < 1:
        thresholds = _thresholds(stack, params.density)
        for deltas in stack.deltas.values():
            deltas.copy_(keep_above(deltas, thresholds))
    for deltas in stack.deltas.values():
        elected = elect(deltas, None, "mass")
        for delta in deltas:
            delta.mul_((delta * elected).sign_().relu_())  # 1 where it has the elected sign, 0 elsewhere
    return Coefficients(stack, params)


def _thresholds(stack: Stack, density: float) -> torch.Tensor:
    """The smallest magnitude that each expert keeps over the model, (T,)."""

    def walk(function: Callable[[torch.Tensor], Any], limit: int | None = None) -> Iterable[Any]:
        return [function(_rows(deltas)[:, :limit].cpu()) for deltas in stack.deltas.values()]

    return kth_largest(walk, density)


def add_slope(tensor: torch.Tensor, slope: torch.Tensor) -> None:
    """Add to the gradient of what is learnt."""
    tensor.grad = slope if tensor.grad is None else tensor.grad + slope


def _rows(vectors: torch.Tensor) -> torch.Tensor:
    """(T, *shape) -> (T, n)."""
    return vectors.reshape(len(vectors), -1)


def grouped(granularity: str, places: Mapping[str, Place]) -> tuple[list[str], dict[str, int]]:
    """What has coefficients of its own: the groups' names, and each tensor's group."""
    names = list(places)
    if granularity == "task":
        return ["model"], dict.fromkeys(names, 0)
    if granularity == "tensor":
        return names, {name: index for index, name in enumerate(names)}
    layers = sorted({place.layer for place in places.values()})
    return [f"layer {layer}" for layer in layers], {name: layers.index(places[name].layer) for name in names}
