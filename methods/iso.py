"""Iso-C and Iso-CTS: add the changes up, then give all their directions the same length.

Iso-CTS first replaces the weakest directions of the sum by the strongest of each expert that the sum leaves out.
Source: Marczak et al. 2025, arXiv:2502.04959; rounding as in the authors' code.
Differs: a direction without any change stays without (a full decomposition gives it an arbitrary one). Own directions
that rounding would make more than there is room for are one fewer. What is no matrix is merged by the mean of the
changes, as the authors' code does.
Formula: sum_i delta_i = U S V^T; merged = base + scale * mean(S) * U V^T. Iso-CTS: U, V are the orthogonalised c
leading directions of the sum and (r - c) / T of each delta_i - U_c U_c^T delta_i; mean over all their singular values.
Cost: iso_c O(m n min(m, n)) time, 5 m n numbers besides the inputs; iso_cts T + 3 times that, (T + 5) m n numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Place
from methods.lazy import torch
from methods.matrices import as_matrix, changes_as_matrices, mean_change
from methods.parameters import Params, tunable, word
from methods.primitives import add_up, changes
from methods.spectra import leading, one_thread, orthogonal, polar, project


@dataclass(frozen=True)
class IsoCParams(Params):
    """Parameters of `iso_c`; also the schema of conf/method/iso_c.yaml."""

    scale: float = tunable(1.0, low=0.1, high=3.0, published=(1.5,))  # multiplies the merged change (alpha)
    matrices: str = word("all", "linear", "conv")  # what is a matrix: all, linear or conv; methods/matrices.py


@dataclass(frozen=True)
class IsoCtsParams(IsoCParams):
    """Parameters of `iso_cts`; also the schema of conf/method/iso_cts.yaml."""

    common_space_fraction: float = tunable(0.8, low=0.0, high=1.0)  # share of directions from the sum, in [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.common_space_fraction <= 1:
            raise ValueError(f"common_space_fraction is a share in [0, 1], got {self.common_space_fraction}")


@one_thread
def iso_c(base: torch.Tensor, experts: torch.Tensor, params: IsoCParams, *, place: Place) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32."""
    if as_matrix(base, place, params.matrices) is None:
        return base + params.scale * mean_change(base, experts)
    total = as_matrix(changes(base, experts), place, params.matrices)
    assert total is not None
    found = polar(total)
    length = found.nuclear_norm / min(total.shape)  # mean of the singular values
    return torch.add(base, found.factor.reshape(base.shape), alpha=params.scale * length)


@one_thread
def iso_cts(base: torch.Tensor, experts: torch.Tensor, params: IsoCtsParams, *, place: Place) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32."""
    deltas = changes_as_matrices(base, experts, place, params.matrices)
    if deltas is None:
        return base + params.scale * mean_change(base, experts)
    n_common, n_own = shares(min(deltas.shape[1:]), len(experts), params.common_space_fraction)
    common = leading(add_up(deltas), n_common)
    own = [leading(delta - project(delta, common.u), n_own) for delta in deltas] if n_own else []
    parts = [common, *own]
    mean = sum(float(part.s.sum(dtype=torch.float64)) for part in parts) / sum(part.s.numel() for part in parts)
    merged = orthogonal([part.u for part in parts]) @ orthogonal([part.v for part in parts]).mT
    return torch.add(base, merged.float().reshape(base.shape), alpha=params.scale * mean)


def shares(rank: int, n_experts: int, fraction: float) -> tuple[int, int]:
    """How many of `rank` directions come from the sum and how many from each expert, the same number for each."""
    n_own = round((rank - int(rank * fraction)) / n_experts)  # halves to the even number, as the authors round
    n_own = min(n_own, rank // n_experts)
    return rank - n_own * n_experts, n_own
