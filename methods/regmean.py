"""RegMean: for each linear layer, the weight whose outputs are closest to every expert's on that expert's inputs.

Source: Jin et al. 2023, arXiv:2212.09849, equation 3 and section 3.3 (Gram matrices' off-diagonal entries reduced).
Differs: solved in float64 with a ridge that pulls towards the simple average, so that inputs which are never active
take the average where the paper's bare inverse fails; what is no linear layer is averaged, as in the paper.
Formula: merged^T = (sum_i G_i)^-1 sum_i G_i expert_i^T, G_i = off_diagonal-reduced X_i^T X_i of the layer's inputs
Cost: O(T m n^2 + n^3) time for m x n, 3 T n^2 float64 numbers; Gram matrices take a forward pass for each example
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import at_least, tunable
from methods.primitives import average


@dataclass(frozen=True)
class RegmeanParams:
    """Parameters of `regmean`; also the schema of conf/method/regmean.yaml."""

    off_diagonal: float = tunable(0.9, low=0.0, high=1.0)  # multiplies what is off the diagonal (alpha), in [0, 1]
    ridge: float = 1e-9  # times the mean diagonal, added to the diagonal

    def __post_init__(self) -> None:
        if not 0 <= self.off_diagonal <= 1:
            raise ValueError(
                f"off_diagonal is a share in [0, 1], got {self.off_diagonal}; percentages are not accepted"
            )
        at_least("ridge", self.ridge, 0)


def regmean(
    base: torch.Tensor | None, experts: torch.Tensor, params: RegmeanParams, *, stats: torch.Tensor | None
) -> torch.Tensor:
    """Merge one tensor: experts (T, out, in) with Gram matrices `stats` (T, in, in) -> (out, in); others averaged.

    Raises:
        ValueError: The Gram matrices are not of the shape (in, in).
    """
    mean = average(experts)
    if stats is None:
        return mean
    if experts.dim() != 3 or stats.shape[1:] != (experts.shape[2], experts.shape[2]):
        raise ValueError(f"a Gram matrix is (in, in) for a weight (out, in), got {tuple(stats.shape[1:])}")
    grams = stats.double() * params.off_diagonal
    diagonal = stats.double().diagonal(dim1=1, dim2=2)  # (T, in)
    grams.diagonal(dim1=1, dim2=2).copy_(diagonal)
    size = float(diagonal.sum(0).mean())
    ridge = params.ridge * size if size > 0 else 1.0  # all zero: the average
    left = grams.sum(0) + ridge * torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    right = (grams @ experts.double().mT).sum(0) + ridge * mean.double().mT  # (in, out)
    return torch.linalg.solve(left, right).mT.float()
