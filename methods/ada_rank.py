"""AdaRank: learn which singular components of each task vector to keep, and the vectors' coefficients with them.

Source: Lee et al. 2025, arXiv:2503.22178 (straight-through binary masks, test-time entropy).
Differs: linear layers' weights are decomposed, as the pool knows them (`matrices`), where the authors go by the names
attn and mlp. 1,000 updates by default; the authors take 10,000 and report the best by accuracy on the test set.
Formula: merged = origin + sum_i c_gi U_i diag(b_i * s_i) V_i^T, b_ir = 1 where its logit is positive, whose gradient is
that of sigmoid(logit / temperature); what is no matrix: origin + sum_i c_gi v_i. The origin is the base, or with
origin=mean the mean of the experts (CART, Choi et al. 2024, arXiv:2412.12153)
Cost: O(T m n min(m, n)) once and each step; 2 T n numbers for square matrices, and a forward and backward pass
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from methods.adamerging import AdamergingParams, Coefficients, add_slope
from methods.kinds import Stack
from methods.lazy import torch
from methods.matrices import as_matrices
from methods.parameters import positive, share, tunable, word
from methods.spectra import leading

_START = 0.1  # of a kept component's logit; of one that is not, the negative


@dataclass(frozen=True)
class AdaRankParams(AdamergingParams):
    """Parameters of `ada_rank`; also the schema of conf/method/ada_rank.yaml."""

    scale: float = tunable(0.3, low=0.0, high=3.0, published=(2.3,))  # where every coefficient starts; 2.3: origin=mean
    steps: int = 1000  # updates
    rank_share: float = share(
        1.0, low=0.05, high=1.0, published=(0.16,)
    )  # of components kept at first; 0.16: origin=mean
    temperature: float = tunable(10.0, low=1.0, high=20.0)  # of the masks' sigmoid
    origin: str = word("base", "mean")  # what changes are of and are added to: the base, or the mean of the experts
    matrices: str = word("linear", "all", "conv")  # what is decomposed; methods/matrices.py

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("temperature", self.temperature)


class Ranks(Coefficients):
    """Coefficients and masks of singular components; see `methods.kinds.Search`."""

    def __init__(self, stack: Stack, params: AdaRankParams) -> None:
        """Decompose.

        Raises:
            ValueError: No tensor is a matrix.
        """
        if params.origin == "mean":
            base = {name: _centred(stack, name) for name in list(stack.base)}
            stack = Stack(base, stack.deltas, stack.places, stack.seed)
        super().__init__(stack, params)
        self.temperature = params.temperature
        self.u: dict[str, torch.Tensor] = {}  # (m, T r)
        self.s: dict[str, torch.Tensor] = {}  # (T, r)
        self.vt: dict[str, torch.Tensor] = {}  # (T r, n)
        self.logits: dict[str, torch.Tensor] = {}  # (T, r)
        for name, place in stack.places.items():
            linear = replace(place, linear=place.linear or place.transposed)
            found = as_matrices(stack.deltas[name], linear, params.matrices)
            if found is not None:
                self._decompose(name, found, params.rank_share)
                del stack.deltas[name]
        if not self.logits:
            raise ValueError(
                f"ada_rank decomposes matrices, and with matrices={params.matrices} none of the {len(stack.base)} "
                "merged tensors is one; matrices=all takes every two-dimensional tensor"
            )
        self.learnt |= {f"mask/{name}": logits for name, logits in self.logits.items()}

    def _decompose(self, name: str, matrices: torch.Tensor, rank_share: float) -> None:
        """Singular components of every expert's change, (T, m, n), side by side."""
        parts = [leading(matrix, min(matrix.shape)) for matrix in matrices]
        self.u[name] = torch.cat([part.u.float() for part in parts], 1)
        self.vt[name] = torch.cat([part.v.float() for part in parts], 1).T.contiguous()
        self.s[name] = torch.stack([part.s.float() for part in parts])
        logits = torch.full_like(self.s[name], _START)
        logits[:, max(int(logits.shape[1] * rank_share), 1) :] = -_START
        self.logits[name] = logits

    def change(self, name: str) -> torch.Tensor:
        """sum_i c_i U_i diag(b_i * s_i) V_i^T, or sum_i c_i v_i."""
        if name not in self.u:
            return super().change(name)
        factors = self.values[self.group_of[name]][:, None] * self._kept(name)
        return ((self.u[name] * factors.flatten()) @ self.vt[name]).reshape(self.stack.base[name].shape)

    def pull(self, name: str, slope: torch.Tensor) -> None:
        """Every component's inner product with the weights' gradient says all."""
        if name not in self.u:
            super().pull(name, slope)
            return
        own = self.group_of[name]
        flat = slope.reshape(self.u[name].shape[0], -1)
        products = ((self.u[name].T @ flat) * self.vt[name]).sum(1).view_as(self.s[name])  # (T, r)
        self._slopes()[own] += (products * self._kept(name)).sum(1)
        soft = (self.logits[name] / self.temperature).sigmoid_()
        through = soft * (1 - soft) / self.temperature
        slopes = self.values[own][:, None] * self.s[name] * products * through
        add_slope(self.logits[name], slopes)

    def _kept(self, name: str) -> torch.Tensor:
        """Singular values of what is kept, zero elsewhere, (T, r)."""
        return self.s[name] * (self.logits[name] > 0)


def ada_rank(stack: Stack, params: AdaRankParams) -> Ranks:
    """Masks and coefficients of all task vectors."""
    return Ranks(stack, params)


def _centred(stack: Stack, name: str) -> torch.Tensor:
    """The mean of the experts, (*shape); the changes become those from it."""
    mean = stack.deltas[name].mean(0)
    stack.deltas[name].sub_(mean)
    return stack.base[name] + mean
