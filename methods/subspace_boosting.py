"""Subspace boosting: raise the small singular values of the summed change, so that no direction is lost in the sum.

Source: Skorobogat et al. 2025, arXiv:2506.16506, on top of task arithmetic; the cut-off as in the authors' code.
Differs: the authors leave what is not in an attention or feed-forward block unboosted (matrices=linear is that for
transformers); a direction without any change stays without, where theirs is raised along an arbitrary one.
Formula: sum_i delta_i = U S V^T, b the first number with S_1 + .. + S_b >= beta * sum(S);
merged = base + scale * U max(S, S_b) V^T. What is no matrix: base + scale * sum_i delta_i.
Cost: O(m n min(m, n)) time, 8 m n numbers besides the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Place
from methods.lazy import torch
from methods.matrices import as_matrix
from methods.parameters import Params, share, tunable, word
from methods.primitives import changes
from methods.spectra import covering, leading, one_thread, polar


@dataclass(frozen=True)
class SubspaceBoostingParams(Params):
    """Parameters of `subspace_boosting`; also the schema of conf/method/subspace_boosting.yaml."""

    beta: float = share(0.01, low=0.001, high=0.5, log=True)  # share of the sum of singular values, in (0, 1]
    scale: float = tunable(0.3, low=0.01, high=1.0)  # multiplies the merged change (alpha in the paper)
    matrices: str = word("all", "linear", "conv")  # what is a matrix: all, linear or conv; methods/matrices.py


@one_thread
def subspace_boosting(
    base: torch.Tensor, experts: torch.Tensor, params: SubspaceBoostingParams, *, place: Place
) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32."""
    total = changes(base, experts)
    matrix = as_matrix(total, place, params.matrices)
    if matrix is not None:
        above = leading(matrix, lambda values: covering(values, params.beta))
        least = above.s[-1]  # what all smaller values become
        boosted = least * polar(matrix).factor + above._replace(s=above.s - least).matrix()
        total = boosted.float().reshape(base.shape)
    return base + params.scale * total
