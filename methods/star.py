"""STAR: keep each change's leading singular directions and stretch them to the nuclear norm that it had.

Source: Lee et al. 2025, arXiv:2502.10339, and the authors' code for the rule of the rank.
Differs: nothing. What is no matrix is merged by the mean of the changes.
Formula: delta_i = U S V^T, k the least number with S_1 + .. + S_k >= eta * sum(S);
merged = base + scale * mean_i(sum(S) / (S_1 + .. + S_k) * U_k S_k V_k^T).
Cost: O(T m n min(m, n)) time, 7 m n numbers besides the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Place
from methods.lazy import torch
from methods.matrices import as_matrices, as_matrix, mean_change
from methods.parameters import Params, share, tunable, word
from methods.spectra import covering, leading, one_thread


@dataclass(frozen=True)
class StarParams(Params):
    """Parameters of `star`; also the schema of conf/method/star.yaml."""

    eta: float = share(0.4, low=0.1, high=0.9)  # share of the sum of singular values kept, in (0, 1]
    scale: float = tunable(1.0, low=0.3, high=3.0)  # multiplies the mean of the changes
    matrices: str = word("all", "linear", "conv")  # what is a matrix: all, linear or conv; methods/matrices.py


@one_thread
def star(base: torch.Tensor, experts: torch.Tensor, params: StarParams, *, place: Place) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32."""
    start, laid = as_matrix(base, place, params.matrices), as_matrices(experts, place, params.matrices)
    if start is None or laid is None:
        return base + params.scale * mean_change(base, experts)
    total = torch.zeros_like(start)
    for expert in laid:
        total += _truncated(expert - start, params.eta)
    return base + (params.scale / len(experts)) * total.reshape(base.shape)


def _truncated(delta: torch.Tensor, eta: float) -> torch.Tensor:
    """A change of fewer directions and the same nuclear norm, (m, n)."""
    norm = 0.0

    def rank(values: torch.Tensor) -> int:
        nonlocal norm
        norm = float(values.sum())
        return covering(values, eta)

    found = leading(delta, rank)
    kept = float(found.s.sum())
    return found.matrix() * (norm / kept) if kept > 0 else torch.zeros_like(delta)
