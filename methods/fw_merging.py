"""FW-Merging: walk through the convex hull of the experts, each step towards those along which the loss falls most.

Source: Chen et al. 2025, arXiv:2503.12649, the linear minimisation oracle over the experts, Algorithm 1; hard and soft,
task-wise (`choose=model`) and layer-wise (`choose=group`).
Differs: the walk starts at the average, which lies in the hull, where the paper starts at task arithmetic (scale=0.3)
or at the base (scale=0). Of all points the one with the least loss is kept. The oracle compares inner products of the
gradient with the experts, as the paper's equation does; the authors' code and FusionBench compare cosines with raw
weights. Soft: the new weights sum to one at most, so that the point that was reached may keep its part.
Formula: c <- c + 2 step_size / (t + 2) (e_i - c), i = argmin_i <gradient, expert_i>, merged = base + sum_i c_i delta_i
    soft: c <- c + sum_j w_j (e_j - c) over the k best, w by projected gradient steps on the loss
Cost: each evaluation a forward and backward pass over all examples and O(T n); (T + 2) n numbers. Hard evaluates
steps + 1 times, soft steps (1 + inner_steps) + 1 times
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from methods.lazy import torch
from methods.ledger import Ledger
from methods.parameters import Params, at_least, finite, in_unit_interval, positive, tunable, word
from methods.simplex import onto_simplex


@dataclass(frozen=True)
class FwMergingParams(Params):
    """Parameters of `fw_merging`; also the schema of conf/method/fw_merging.yaml."""

    oracle: str = word("hard", "soft")  # hard goes towards the best expert, soft weighs the best `vertices` anew
    granularity: str = word("layer", "task", "tensor")  # what has coefficients: a block, the model (task) or a tensor
    choose: str = word("group", "model")  # what an expert is chosen for: each group by itself, or the whole model
    scale: float | None = None  # where every coefficient starts; None: one over the number of experts
    steps: int = 10  # of Frank-Wolfe
    step_size: float = tunable(1.0, low=0.01, high=1.0, log=True)  # hard: share of the paper's 2 / (t + 2); in (0, 1]
    vertices: int = tunable(4, low=1, high=8)  # soft: experts that are weighed in a step; all, where there are fewer
    inner_steps: int = 20  # soft: projected gradient steps for their weights
    lr: float = tunable(0.1, low=1e-3, high=1.0, log=True)  # soft: length of such a step

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None:
            finite("scale", self.scale)
        in_unit_interval("step_size", self.step_size)
        positive("lr", self.lr)
        for name in ("steps", "vertices", "inner_steps"):
            at_least(name, getattr(self, name), 1)

    def evaluations(self, n_experts: int) -> int:
        """How often the loss is asked for."""
        return self.steps * (1 if self.oracle == "hard" else 1 + self.inner_steps) + 1


def fw_merging(
    shape: tuple[int, int],
    objective: Callable[[torch.Tensor], tuple[float, torch.Tensor]],
    params: FwMergingParams,
    report: Callable[[int, float, torch.Tensor], None],
) -> torch.Tensor:
    """Find the coefficients, (groups, T); arguments and errors as `adamerging`'s."""
    start = 1 / shape[1] if params.scale is None else params.scale
    ledger = Ledger(objective, report, "a smaller step_size or lr may help")
    here = torch.full(shape, start, dtype=torch.float32)
    for step in range(params.steps):
        slopes = ledger(here)[1]
        scores = slopes if params.choose == "group" else slopes.sum(0, keepdim=True).expand(shape)
        n_chosen = min(params.vertices, shape[1]) if params.oracle == "soft" else 1
        chosen = scores.topk(n_chosen, dim=1, largest=False).indices  # (groups, k), the best first
        if params.oracle == "hard":
            weights = torch.full((shape[0], 1), 2 * params.step_size / (step + 2))
        else:
            weights = _weighed(ledger, here, chosen, params)
        here = _towards(here, chosen, weights)
    ledger(here)
    return ledger.best


def _towards(here: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The point that moves by its weight, (groups, k), towards each chosen expert."""
    return (here * (1 - weights.sum(1, keepdim=True))).scatter_add_(1, chosen, weights)


def _weighed(ledger: Ledger, here: torch.Tensor, chosen: torch.Tensor, params: FwMergingParams) -> torch.Tensor:
    """The chosen experts' weights, (groups, k): not negative, a sum of one at most."""
    weights = torch.zeros(chosen.shape)
    for _ in range(params.inner_steps):
        slopes = ledger(_towards(here, chosen, weights))[1]
        falls = slopes.gather(1, chosen) - (slopes * here).sum(1, keepdim=True)  # along expert - point
        weights = onto_simplex(weights - params.lr * falls, capped=True)
    return weights
