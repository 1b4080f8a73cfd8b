"""AdaMerging: learn the coefficients of task arithmetic by minimising the entropy of predictions on unlabelled inputs.

Source: Yang et al. 2024, arXiv:2310.02575, equations 3 to 6.
Differs: nothing with granularity=tensor, which is what the authors' code calls layer-wise (every parameter tensor has
its own coefficients); granularity=layer gives one set to each block, granularity=task one set to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import at_least, finite, one_of, positive, tunable


@dataclass(frozen=True)
class AdamergingParams:
    """Parameters of `adamerging`; also the schema of conf/method/adamerging.yaml."""

    granularity: str = "tensor"  # what has coefficients of its own: task (the model), layer (a block) or tensor
    scale: float = tunable(0.3, low=0.0, high=1.0)  # where every coefficient starts
    lr: float = tunable(1e-3, low=1e-4, high=1e-1, log=True)  # Adam's learning rate
    steps: int = 500  # updates
    clamp: bool = False  # hold the coefficients in [0, 1]

    def __post_init__(self) -> None:
        one_of("granularity", self.granularity, ("task", "layer", "tensor"))
        finite("scale", self.scale)
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
    optimizer = torch.optim.Adam([coefficients], lr=params.lr)
    for step in range(params.steps):
        loss, coefficients.grad = objective(coefficients)
        if loss != loss:
            raise FloatingPointError(
                f"the entropy is not a number at step {step}; a smaller lr than {params.lr} may help"
            )
        report(step, loss, coefficients.clone())
        optimizer.step()
        if params.clamp:
            coefficients.clamp_(0, 1)
    return coefficients
