"""ACE-Merging: the weight whose outputs are closest to every expert's, on input covariances that the changes tell.

Source: Xu et al. 2026, arXiv:2603.02945, equations 5 to 19 (equations as of version 2; sample variance in equation 7 as
in the authors' code).
Differs: an expert that leaves a matrix as it was, or moves all its rows alike, tells no covariance and is left out;
where that is every expert (a single row), and for what is no matrix, the mean of the changes is taken, as in the
authors' code for the latter. `scale` multiplies the merged change.
Formula: W_t = delta_t less its mean row, S_t = W_t^T W_t; divided by its trace where gamma = Var(log ||delta||^2) /
mean(log ||delta||^2)^2 > threshold, together with epsilon; R_t = S_t + epsilon I, c = mean row of sum_t S_t;
x = sum_t W_t R_t (sum_t R_t + 1 c^T)^-1; for gamma > threshold + sigma U_k V_k^T, of x + sum_t delta_t (S_t - mean R)
Cost: O(T m n^2 + n^3) time, (T + 3) m n + 3 n^2 float64 numbers
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from methods.kinds import Place
from methods.lazy import torch
from methods.matrices import changes_as_matrices, mean_change
from methods.parameters import Params, positive, share, tunable, word
from methods.spectra import leading


@dataclass(frozen=True)
class AceParams(Params):
    """Parameters of `ace`; also the schema of conf/method/ace.yaml."""

    scale: float = tunable(1.0, low=0.1, high=2.0)  # multiplies the merged change
    epsilon: float = tunable(1e-5, low=1e-6, high=1e-1, log=True, published=(2e-4, 4e-2))  # added to each covariance
    threshold: float = tunable(0.3, low=0.05, high=0.5)  # gamma above which experts count as of unlike size (tau)
    fraction: float = share(0.3, low=0.05, high=0.5)  # share of directions that are refined then, in (0, 1]
    matrices: str = word("all", "linear", "conv")  # what is a matrix: methods/matrices.py

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("epsilon", self.epsilon)


def ace(base: torch.Tensor, experts: torch.Tensor, params: AceParams, *, place: Place) -> torch.Tensor:
    """Merge one tensor: base (*shape), experts (T, *shape) -> (*shape), all float32."""
    deltas = changes_as_matrices(base, experts, place, params.matrices)
    merged = None if deltas is None else _merged(deltas.double(), params)
    if merged is None:
        return base + params.scale * mean_change(base, experts)
    return base + params.scale * merged.float().reshape(base.shape)


def _merged(deltas: torch.Tensor, params: AceParams) -> torch.Tensor | None:
    """The merged change, (T, m, n) -> (m, n) float64; None where no change tells a covariance."""
    centred = deltas - deltas.mean(1, keepdim=True)
    traces = [float(own.square().sum()) for own in centred]
    told = [index for index, trace in enumerate(traces) if trace > 0]
    if not told:
        return None
    energies = [float(deltas[index].square().sum()) for index in told]
    unlike = _gamma(energies) > params.threshold
    identity = torch.eye(deltas.shape[2], dtype=deltas.dtype, device=deltas.device)
    total, right, scales = torch.zeros_like(identity), torch.zeros_like(deltas[0]), []
    ridge = 0.0
    for index in told:
        scale = 1 / traces[index] if unlike else 1.0
        total.addmm_(centred[index].T, centred[index], alpha=scale)
        right.addmm_(centred[index] @ centred[index].T, centred[index], alpha=scale)
        right.add_(centred[index], alpha=params.epsilon * scale)
        ridge += params.epsilon * scale
        scales.append(scale)
    prior = total.mean(0) / (statistics.fmean(energies) if unlike else 1.0)  # c, (n,)
    regular = total + ridge * identity
    merged = _solved(regular, prior, right)
    if not unlike:
        return merged
    fused = merged.clone()
    for index, scale in zip(told, scales, strict=True):
        fused.addmm_(deltas[index] @ centred[index].T, centred[index], alpha=scale)
    fused.addmm_(deltas[told].sum(0), regular, alpha=-1 / len(told))
    u, s, v = leading(fused, max(1, int(min(fused.shape) * params.fraction)))
    return merged + (s.mean() * (u @ v.mT)).to(merged)


def _solved(regular: torch.Tensor, prior: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Of X (regular + 1 prior^T) = right the X, (m, n): regular (n, n) positive definite, and one rank more."""
    factor = torch.linalg.cholesky(regular)
    both = torch.cholesky_solve(torch.cat([right, prior[None]]).T, factor).T  # X regular^-1, symmetric
    plain, own = both[:-1], both[-1]
    return plain - torch.outer(plain.sum(1), own) / (1 + own.sum())


def _gamma(energies: list[float]) -> float:
    """How unlike the experts' sizes are: variance of their logarithms over the square of the mean."""
    logarithms = [math.log(energy) for energy in energies]
    spread = statistics.variance(logarithms) if len(logarithms) > 1 else 0.0
    mean = statistics.fmean(logarithms)
    return spread / mean**2 if spread else 0.0
