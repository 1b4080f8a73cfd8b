"""The modules that builds put in place of a model or of its blocks: an ensemble, and a block mixed by a router."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from methods.we_moe import WeMoeParams


class Ensemble(nn.Module):
    """Mean of several modules' outputs."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.requires_grad_(False)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """(B, D) from every expert -> their mean (B, D)."""
        return torch.stack([expert(**inputs) for expert in self.experts]).mean(0)


class Routed(nn.Module):
    """A feed-forward block whose weights are base + sum of gate times change, one set of gates for each example.

    The gates are the router's outputs averaged over the example's tokens (arXiv:2402.00433, equation 7).
    """

    def __init__(self, base: nn.Module, experts: Sequence[nn.Module], params: WeMoeParams) -> None:
        super().__init__()
        self.base = copy.deepcopy(base).requires_grad_(False)
        self.changes = copy.deepcopy(base)
        theirs = [dict(expert.named_parameters()) for expert in experts]
        for name, parameter in base.named_parameters():
            stacked = torch.stack([parameters[name].detach() - parameter.detach() for parameters in theirs])
            owner = self.changes.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(stacked, requires_grad=False))  # (T, *shape)
        width = next(p.shape[-1] for p in base.parameters() if p.dim() == 2)
        self.router = _router(width, len(experts), params)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)."""
        gates = self.gates(hidden_states)  # (B, T)
        changes = dict(self.changes.named_parameters())
        weights = {
            name: parameter + torch.tensordot(gates, changes[name], dims=1)  # (B, *shape)
            for name, parameter in self.base.named_parameters()
        }

        def one(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(self.base, weights, (tokens,))

        return torch.func.vmap(one)(weights, hidden_states)

    def gates(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mixing coefficients of each example, (B, N, D) -> (B, T)."""
        return self.router(hidden_states).mean(dim=1)


def _router(width: int, n_experts: int, params: WeMoeParams) -> nn.Module:
    """A router whose first answer is `scale` for every expert and input."""
    last = nn.Linear(width, n_experts)
    nn.init.normal_(last.weight, std=0.01) if params.router_layers == 2 else nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, params.scale)
    if params.router_layers == 1:
        return last
    first = nn.Linear(width, width)
    nn.init.normal_(first.weight, std=0.01)
    nn.init.zeros_(first.bias)
    return nn.Sequential(first, nn.ReLU(), last)
