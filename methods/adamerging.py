"""AdaMerging: learn the coefficients of task arithmetic by minimising the entropy of predictions on unlabelled inputs.

Source: Yang et al. 2024, arXiv:2310.02575, equations 3 to 6.
Differs: nothing with granularity=tensor, which is what the authors' code calls layer-wise (every parameter tensor has
its own coefficients); granularity=layer gives one set to each block, granularity=task one set to the model.
Formula: merged = base + sum_i c_gi (expert_i - base), c of each group g by Adam on the predictions' entropy
Cost: each step: the merge and its gradient, O(T n), and one forward and backward pass of the model; (T + 2) n numbers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from methods.adam import Adam
from methods.lazy import torch
from methods.parameters import Params, at_least, one_of, positive, tunable


@dataclass(frozen=True)
class AdamergingParams(Params):
    """Parameters of `adamerging`; also the schema of conf/method/adamerging.yaml."""

    granularity: str = "tensor"  # what has coefficients of its own: task (the model), layer (a block) or tensor
    scale: float = tunable(0.3, low=0.0, high=1.0)  # where every coefficient starts
    lr: float = tunable(1e-3, low=1e-4, high=1e-1, log=True)  # Adam's learning rate
    steps: int = 500  # updates
    clamp: bool = False  # hold the coefficients in [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("granularity", self.granularity, ("task", "layer", "tensor"))
        positive("lr", self.lr)
        at_least("steps", self.steps, 1)


def adamerging(
    shape: tuple[int, int],
    objective: Callable[[torch.Tensor], tuple[float, torch.Tensor]],
    params: AdamergingParams,
    report: Callable[[int, float, torch.Tensor], None],
) -> torch.Tensor:
    """Find the coefficients, (groups, T), of a rule.

    Args:
        shape: Number of groups and of experts.
        objective: Coefficients -> the loss on the next batch and its gradient, (groups, T).
        params: See AdamergingParams.
        report: Called after each step with its number, the loss and the coefficients that had it.

    Raises:
        FloatingPointError: The loss is no number; the message names the step.
    """
    coefficients = torch.full(shape, params.scale, dtype=torch.float32)
    adam = Adam(coefficients, params.lr)
    for step in range(params.steps):
        loss, gradient = objective(coefficients)
        if loss != loss:
            raise FloatingPointError(
                f"the entropy is not a number at step {step}; a smaller lr than {params.lr} may help"
            )
        report(step, loss, coefficients.clone())
        adam.step(gradient)
        if params.clamp:
            coefficients.clamp_(0, 1)
    return coefficients
