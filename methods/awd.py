"""AWD: task arithmetic after one redundant vector, learnt so that the changes become orthogonal, is taken from each.

Source: Xiong et al. 2024, arXiv:2411.18729, equations 9 to 11 and Algorithm 1 (gradient descent from zero); lr,
alpha and steps as reported of its section 4.3.
Differs: scope=tensor learns a vector for each tensor on its own. Descent from zero never leaves the span of the
changes, so it runs in coordinates of that, had from inner products: same steps, no second model. The step on the norm
is the proximal one, which lets the vector be zero where descent would jump about it. All-zero changes take no part.
Formula: d by gradient descent on mean_(i != j) |cos(delta_i - d, delta_j - d)| + alpha ||d||;
merged = base + scale * sum_i (delta_i - d)
Cost: O(T^2 n) time once for inner products, O(steps T^3) for the descent, O(T n) for the merge; T + 3 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.angles import inner_products, summed
from methods.kinds import Pieces
from methods.lazy import torch
from methods.parameters import Params, at_least, positive, tunable, word
from methods.primitives import changes

_NULL = 1e-12  # of the largest eigenvalue of inner products: what is below is no direction


@dataclass(frozen=True)
class AwdParams(Params):
    """Parameters of `awd`; also the schema of conf/method/awd.yaml."""

    scale: float = tunable(0.3, low=0.0, high=1.5)  # multiplies the sum of the disentangled changes
    alpha: float = tunable(0.1, low=0.0, high=1.0)  # what the redundant vector's norm costs against mean |cosine|
    lr: float = tunable(0.01, low=1e-3, high=1.0, log=True)  # learning rate (beta), in the weights' own unit squared
    steps: int = 300  # updates, at least 0: none is task arithmetic
    scope: str = word("model", "tensor")  # model: one vector and cosines over all weights; tensor: of each tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("alpha", self.alpha, 0)
        positive("lr", self.lr)
        at_least("steps", self.steps, 0)


def prepared(params: AwdParams) -> tuple[str, ...]:
    """What `coefficients` reads once for the whole model, and so cannot differ from tensor to tensor."""
    return ("alpha", "lr", "steps") if params.scope == "model" else ()


def products(pieces: Pieces) -> torch.Tensor:
    """Inner products of the task vectors, (T, T) float64."""
    return summed(pieces(lambda piece: inner_products(piece.experts, piece.base)))


def coefficients(pieces: Pieces, params: AwdParams, kept: torch.Tensor | None = None) -> list[float]:
    """What multiplies each change in the sum of the disentangled ones, T of them: ones less the redundant vector's."""
    table = products(pieces) if kept is None else kept
    n_experts = len(table)
    values, vectors = torch.linalg.eigh(table)
    live = values > _NULL * values[-1]
    lengths, vectors = values[live].sqrt(), vectors[:, live]
    redundant = torch.zeros_like(lengths)  # in the span's own coordinates, (r,)
    for _ in range(params.steps if n_experts > 1 else 0):
        redundant = redundant - params.lr * _gradient(vectors * lengths - redundant)
        norm = float(redundant.norm())
        redundant *= max(0.0, 1 - params.lr * params.alpha / norm) if norm > 0 else 0.0
    return (1 - n_experts * (vectors @ (redundant / lengths))).tolist()


def _gradient(rest: torch.Tensor) -> torch.Tensor:
    """Of the mean |cosine| by the redundant vector, (r,), at what that leaves of the changes, (T, r)."""
    found = rest @ rest.T
    squares = found.diagonal()
    inverse = torch.where(squares > 0, squares.rsqrt(), 0.0)
    scale = inverse[:, None] * inverse
    slopes = found.sign() * (scale - found * scale * inverse.square()[:, None])
    slopes.fill_diagonal_(0)
    return -2 / (len(rest) * (len(rest) - 1)) * (slopes.sum(1) @ rest)


def awd(base: torch.Tensor, experts: torch.Tensor, params: AwdParams, *, numbers: list[float]) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape), coefficients -> (*shape), all float32."""
    return changes(base, experts, numbers).mul_(params.scale).add_(base)
