"""TSV-M: keep each expert's leading singular directions and make all experts' directions orthogonal to each other.

Source: Gargiulo et al. 2025, arXiv:2412.00081 (TSV-Merge).
Differs: an expert keeps at least one direction where a matrix has fewer than there are experts; directions in which an
expert changes nothing take no part (a full decomposition gives it arbitrary ones, which push the others aside). What is
no matrix is merged by the mean of the changes, as the authors' code does.
Formula: delta_i ~ U_i S_i V_i^T of rank floor(min(m, n) / T); U = [U_1 .. U_T], V alike;
merged = base + scale * polar(U) diag(S) polar(V)^T. weights multiply the delta_i beforehand.
Cost: O((T + 2) m n min(m, n)) time, 8 m n numbers besides the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Place
from methods.lazy import torch
from methods.matrices import as_matrices, as_matrix, mean_change
from methods.parameters import Params, per_expert, tunable, word
from methods.spectra import leading, one_thread, orthogonal


@dataclass(frozen=True)
class TsvMParams(Params):
    """Parameters of `tsv_m`; also the schema of conf/method/tsv_m.yaml."""

    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change (alpha in the paper)
    weights: list[float] | None = None  # one for each expert: of its change, before all else; null for ones
    matrices: str = word("all", "linear", "conv")  # what is a matrix: all, linear or conv; methods/matrices.py


@one_thread
def tsv_m(base: torch.Tensor, experts: torch.Tensor, params: TsvMParams, *, place: Place) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32.

    Raises:
        ValueError: There are not as many weights as experts.
    """
    weights = None if params.weights is None else per_expert("weights", params.weights, len(experts))
    start, laid = as_matrix(base, place, params.matrices), as_matrices(experts, place, params.matrices)
    if start is None or laid is None:
        return base + params.scale * mean_change(base, experts, weights)
    rank = max(min(start.shape) // len(experts), 1)
    parts = []
    for index, expert in enumerate(laid):
        delta = expert - start
        parts.append(leading(delta if weights is None else delta.mul_(weights[index]), rank))
    u, v = orthogonal([part.u for part in parts]), orthogonal([part.v for part in parts])
    merged = (u * torch.cat([part.s for part in parts])) @ v.mT
    return torch.add(base, merged.float().reshape(base.shape), alpha=params.scale)
