"""OPCM: merge experts one after the other, each new task vector projected away from the directions already in use.

Source: Tang et al. 2025, arXiv:2501.09522, equations 6 to 9 and Algorithm 1.
Differs: nothing; every parameter takes part. FusionBench leaves parameters held by modules with children (CLIP's class
embedding) at the first expert's. Directions in which nothing is merged yet hold nothing back; a full decomposition
completes them by arbitrary ones.
Formula: x = (lambda x + project(delta_t)) / lambda', ||x|| = mean_i ||delta_i||; merged = base + x
Cost: each expert: O(m n min(m, n)) time for a linear layer, O(n) for others; base, expert, x: 4 models in memory
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from methods.kinds import Roles
from methods.lazy import torch
from methods.parameters import tunable
from methods.spectra import leading


@dataclass(frozen=True)
class OpcmParams:
    """Parameters of `opcm`; also the schema of conf/method/opcm.yaml."""

    alpha: float = tunable(0.5, low=0.0, high=0.95)  # share of the singular values' sum that is kept free, in [0, 1)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha is a share in [0, 1), got {self.alpha}; percentages are not accepted")


def opcm(base: Mapping[str, torch.Tensor], params: OpcmParams, roles: Roles) -> Opcm:
    """Start a merge from the base's tensors (float32)."""
    return Opcm(base, params, roles)


class Opcm:
    """The merged task vector so far and what its scale needs."""

    def __init__(self, base: Mapping[str, torch.Tensor], params: OpcmParams, roles: Roles) -> None:
        self.base, self.params, self.roles = base, params, roles
        self.merged: dict[str, torch.Tensor] = {}  # task vector, by name
        self.scale = 1.0  # lambda of the paper
        self.norms: list[float] = []

    def update(self, expert: Mapping[str, torch.Tensor]) -> None:
        """Merge one more expert."""
        deltas = {name: expert[name] - self.base[name] for name in expert}
        self.norms.append(_norm(deltas))
        if not self.merged:
            self.merged = deltas
            return
        total = {name: self.scale * self.merged[name] + self._project(name, delta) for name, delta in deltas.items()}
        target = sum(self.norms) / len(self.norms)
        self.scale = _norm(total) / target if target > 0 else 1.0
        if self.scale > 0:
            total = {name: delta / self.scale for name, delta in total.items()}
        self.merged = total

    def result(self) -> dict[str, torch.Tensor]:
        """Base plus merged task vector."""
        return {name: self.base[name] + delta for name, delta in self.merged.items()}

    def _project(self, name: str, delta: torch.Tensor) -> torch.Tensor:
        """A linear layer's change without its part in the leading directions of what is merged."""
        if not self.roles.is_linear(name) or delta.numel() == 0:
            return delta
        u, s, v = leading(self.merged[name].double(), min(delta.shape))
        past = s.cumsum(0) > self.params.alpha * s.sum()
        rank = int(past.to(torch.int8).argmax())  # first position past alpha, from 0
        rows = u.mT @ delta.to(u.dtype)  # (r, n)
        own = (rows.mT * v).sum(0)  # what each pair of directions has in the change, (r,)
        block = rows[:rank] @ v[:, :rank]
        block.diagonal().zero_()
        held = own[:, None] * v.mT
        held[:rank] += block @ v[:, :rank].mT
        return (delta - u @ held).float()


def _norm(deltas: Mapping[str, torch.Tensor]) -> float:
    """L2 norm over all tensors."""
    return sum(float(delta.double().square().sum()) for delta in deltas.values()) ** 0.5
