"""WUDI merging: the change that differs from each expert's only where that expert's inputs are not, found by Adam.

Source: Cheng et al. 2025, arXiv:2503.08099: the loss over matrices (a linear layer's change spans its inputs), by Adam.
Differs: nothing for matrices; what is no matrix takes the mean of the changes, as in the authors' code. An all-zero
change constrains nothing. The gradient is written out, so that a step is one product whatever the number of experts.
Formula: x from sum_i delta_i, `steps` of Adam on sum_i ||(x - delta_i) delta_i^T||^2 / ||delta_i||^2;
merged = base + scale * x
Cost: O(T m n^2 + steps m n min(n, 2 T m)) time, (3 T + 7) m n + n^2 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.adam import Adam
from methods.kinds import Place
from methods.lazy import torch
from methods.matrices import changes_as_matrices, mean_change
from methods.parameters import Params, at_least, positive, tunable, word
from methods.primitives import add_up


@dataclass(frozen=True)
class WudiParams(Params):
    """Parameters of `wudi`; also the schema of conf/method/wudi.yaml."""

    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change
    lr: float = tunable(1e-5, low=1e-6, high=1e-2, log=True)  # Adam's learning rate: an entry moves by it in a step
    steps: int = tunable(400, low=50, high=800)  # updates, at least 0: none leave the sum of the changes
    matrices: str = word("all", "linear", "conv")  # what is a matrix: methods/matrices.py

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("lr", self.lr)
        at_least("steps", self.steps, 0)


def wudi(base: torch.Tensor, experts: torch.Tensor, params: WudiParams, *, place: Place) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32."""
    deltas = changes_as_matrices(base, experts, place, params.matrices)
    if deltas is None:
        return base + params.scale * mean_change(base, experts)
    return base + params.scale * _optimised(deltas, params).reshape(base.shape)


def _optimised(deltas: torch.Tensor, params: WudiParams) -> torch.Tensor:
    """The merged change, (T, m, n) -> (m, n): away from the sum by y, the gradient of the loss is y gram + start."""
    total, (n_experts, m, n) = add_up(deltas), deltas.shape
    if params.steps == 0:
        return total
    rows, start, gram = [], torch.zeros_like(total), total.new_zeros(n, n)  # the loss's second derivative
    for delta in deltas:
        square = float(delta.double().square().sum())
        row = delta * ((2 / square) ** 0.5 if square else 0.0)
        if m < n:  # whichever order of the products is cheaper
            rows.append(row)
            start.addmm_((total - delta) @ row.T, row)
        else:
            own = row.T @ row
            gram += own
            start.addmm_(total - delta, own)
    stacked = torch.cat(rows) if rows else None
    if stacked is not None and n_experts * n + params.steps * n < params.steps * 2 * n_experts * m:
        gram, stacked = stacked.T @ stacked, None
    away, gradient = torch.zeros_like(total), torch.empty_like(total)
    adam = Adam(away, params.lr)
    for _ in range(params.steps):
        left, right = (away, gram) if stacked is None else (away @ stacked.T, stacked)
        torch.addmm(start, left, right, out=gradient)
        adam.step(gradient)
    return total.add_(away)
