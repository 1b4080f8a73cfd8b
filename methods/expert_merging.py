"""Expert Merging: learn coefficients for each layer that bring hidden states and answers near those of the experts.

Source: Zhang et al. 2025, arXiv:2509.25712, Expert Merging (section 3, without the chunks of Expert Merging++); initial
value, temperature and weights of the terms as in the authors' code.
Differs: Adam moves the coefficients themselves, where the authors' code moves their logits by AdamW. They start at one
over the number of experts; the code's 0.1 is scale=0.1. Those with the least loss of all are kept, where the code stops
early. Embeddings, norms and biases are merged like the rest.
Formula: merged = base + sum_k c_gk delta_k, c by Adam on sum_k weight_k (hidden * mean_l ||h_l - h_l^k||^2 / size
    + T^2 KL(softmax(z^k / T), softmax(z / T))) + gamma * mean |c - c_start|, over the inputs of each expert's own task
Cost: each step a forward and backward pass and O(T n); (T + 2) n numbers, and the experts' hidden states of all inputs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from methods.adam import Adam
from methods.lazy import torch
from methods.ledger import Ledger
from methods.parameters import Params, at_least, finite, positive, tunable, word


@dataclass(frozen=True)
class ExpertMergingParams(Params):
    """Parameters of `expert_merging`; also the schema of conf/method/expert_merging.yaml."""

    granularity: str = word("tensor", "task", "layer")  # what has its own coefficients: a tensor, the model or a block
    scale: float | None = None  # where every coefficient starts; None: one over the number of experts
    temperature: float = tunable(1.0, low=0.5, high=4.0)  # T, of both answers
    hidden: float = tunable(1.0, low=0.01, high=10.0, log=True)  # weight of the hidden states; 0 leaves them out
    gamma: float = tunable(0.8, low=0.01, high=10.0, log=True, published=(5.0,))  # weight of the way from the start
    weights: list[float] | None = None  # of each expert's task in the loss; None: ones
    lr: float = tunable(1e-2, low=1e-4, high=1e-1, log=True)  # Adam's learning rate
    steps: int = 100  # updates

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None:
            finite("scale", self.scale)
        positive("temperature", self.temperature)
        positive("lr", self.lr)
        at_least("hidden", self.hidden, 0)
        at_least("gamma", self.gamma, 0)
        at_least("steps", self.steps, 1)

    def evaluations(self, n_experts: int) -> int:
        """How often the loss is asked for."""
        return self.steps + 1


def expert_merging(
    shape: tuple[int, int],
    objective: Callable[..., tuple[float, torch.Tensor]],
    params: ExpertMergingParams,
    report: Callable[[int, float, torch.Tensor], None],
) -> torch.Tensor:
    """Find the coefficients, (groups, T); arguments and errors as `adamerging`'s.

    The objective is the distance from the experts; what is added for the way from the start is the method's own.
    """
    start = 1 / shape[1] if params.scale is None else params.scale
    coefficients = torch.full(shape, start, dtype=torch.float32)
    ledger = Ledger(objective, report, f"a smaller lr than {params.lr} may help")
    adam = Adam(coefficients, params.lr)
    for _ in range(params.steps):
        away = coefficients - start
        _, slopes = ledger(coefficients, penalty=params.gamma * float(away.abs().mean()))
        adam.step(slopes + params.gamma / away.numel() * away.sign())
    ledger(coefficients, penalty=params.gamma * float((coefficients - start).abs().mean()))
    return ledger.best
