"""A linear layer whose experts are low-rank changes of it, chosen for each token by the directions that they change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from methods.routed import Router
from methods.spectra import leading

if TYPE_CHECKING:
    from methods.smile import SmileParams


class Projections(Router):
    """Sends a token to the experts on whose directions it is longest; has no weights of its own."""

    def __init__(self, n_experts: int, gate_k: int, top_k: int) -> None:
        """Look at the first `gate_k` directions of each expert, choose `top_k` experts."""
        nn.Module.__init__(self)
        self.n_experts = self.n_gates = n_experts
        self.gate_k, self.top_k = gate_k, top_k
        self.fixed = None
        self.forget()

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Inputs by directions, (..., T, r) -> gates (..., T): at most `top_k` of them above 0, sum 1."""
        if self.fixed is not None:
            return self.fixed.to(codes).expand(codes.shape[:-1])
        logits = codes[..., : self.gate_k].norm(dim=-1)
        chosen, which = logits.topk(self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, which, chosen.softmax(-1))


class Smile(nn.Linear):
    """W x + b and, of the `top_k` experts with the longest projections of x, what they change, weighted.

    `weight` and `bias` are the base's, by the names that they have in any linear layer. `down` (T, r, in) holds the
    right singular vectors of the changes, the first `gate_k` of which route and the first `k` of which are the
    experts'; `up` (T, out, k) holds left singular vectors times singular values; `shift` (T, out) changes of the bias.
    """

    def __init__(self, base: nn.Linear, experts: Sequence[nn.Linear], params: SmileParams) -> None:
        bias = base.bias is not None
        super().__init__(base.in_features, base.out_features, bias, device="meta")
        self.weight = nn.Parameter(base.weight.detach())
        self.register_parameter("bias", nn.Parameter(base.bias.detach()) if bias else None)
        rank = min(self.in_features, self.out_features)
        gate_k = min(params.gate_k, rank, max(self.in_features // 2, 1))  # on all directions every token is as long
        self.k = min(params.k, rank)
        self.router = Projections(len(experts), gate_k, params.top_k)
        parts = [_factors(expert.weight - base.weight, gate_k, self.k) for expert in experts]
        self.down = nn.Parameter(torch.stack([down for down, _ in parts]))
        self.up = nn.Parameter(torch.stack([up for _, up in parts]))
        self.shift = nn.Parameter(torch.stack([expert.bias - base.bias for expert in experts])) if bias else None
        self.requires_grad_(False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        codes = self._codes(hidden_states)
        gates = self.router.note(self.router(codes)).flatten(0, -2)
        found = super().forward(hidden_states).flatten(0, -2)
        for expert, (code, gate) in enumerate(zip(codes.flatten(0, -3).unbind(1), gates.unbind(1), strict=True)):
            rows = gate.nonzero().squeeze(1)
            change = nn.functional.linear(code[rows, : self.k], self.up[expert])
            if self.shift is not None:
                change = change + self.shift[expert]
            found = found.index_add(0, rows, (gate[rows, None] * change).to(found.dtype))
        return found.view(*hidden_states.shape[:-1], self.out_features)

    def gates(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Weight of each expert for each token, (..., in) -> (..., T)."""
        return self.router(self._codes(hidden_states))

    def _codes(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Inputs by the directions that each expert changes, (..., in) -> (..., T, r)."""
        return (hidden_states @ self.down.flatten(0, 1).mT).unflatten(-1, self.down.shape[:2])


def _factors(change: torch.Tensor, gate_k: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) -> (max(gate_k, k), in) and (out, k), whose product is the change's best approximation of rank k.

    Where the change has no further direction, rows and columns are 0: nothing is routed by it.
    """
    rank = max(gate_k, k)
    if change.is_meta:  # the structure alone
        return change.new_empty(rank, change.shape[1]), change.new_empty(change.shape[0], k)
    u, s, v = leading(change.detach(), rank)
    down = (v * (s > 0)).mT.float().contiguous()
    return down, (u * s)[:, :k].float().contiguous()
