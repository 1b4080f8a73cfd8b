"""Linear layers mixed by gates: changes as they are, sparse, or as singular directions with a gate each.

Gates are (B, G), one set for each example; (B, N, G), one for each token, where a causal block must not look ahead; or
(G,), the same for all inputs. With (B, G) weights are mixed, with (B, N, G) outputs: for a linear layer it is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from methods.selection import count_kept


class Gates:
    """The gates of the inputs that are in a block."""

    now: torch.Tensor


class Dense(nn.Module):
    """Changes of a matrix as they are."""

    def __init__(self, deltas: torch.Tensor) -> None:
        """Keep (T, out, in)."""
        super().__init__()
        self.deltas = nn.Parameter(deltas, requires_grad=False)

    def mixed(self, gates: torch.Tensor) -> torch.Tensor:
        """(..., T) -> (..., out, in)."""
        return torch.tensordot(gates, self.deltas, dims=1)

    def applied(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """(B, N, in), (B, N, T) -> (B, N, out)."""
        terms = (linear(x, delta) * gates[..., index, None] for index, delta in enumerate(self.deltas))
        return sum(terms, start=x.new_zeros(()))


class Sparse(nn.Module):
    """The entries of each change that are largest in magnitude, and where they are."""

    places: torch.Tensor

    def __init__(self, deltas: torch.Tensor, density: float) -> None:
        """Keep a share of (T, out, in), of each expert's the same number."""
        super().__init__()
        flat = deltas.flatten(1)
        places = flat.abs().topk(count_kept(density, flat.shape[1]), dim=1).indices.sort(dim=1).values
        self.shape = deltas.shape[1:]
        self.values = nn.Parameter(flat.gather(1, places), requires_grad=False)
        self.register_buffer("places", places)

    def mixed(self, gates: torch.Tensor) -> torch.Tensor:
        """(..., T) -> (..., out, in)."""
        wide = gates.reshape(-1, gates.shape[-1])
        found = self.values.new_zeros(len(wide), self.shape.numel())
        found = found.index_add(1, self.places.flatten(), (wide[..., None] * self.values).flatten(1))
        return found.reshape(*gates.shape[:-1], *self.shape)

    def applied(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """(B, N, in), (B, N, T) -> (B, N, out)."""
        each = self.mixed(torch.eye(len(self.values), dtype=self.values.dtype, device=x.device))
        return sum((linear(x, delta) * gates[..., index, None] for index, delta in enumerate(each)), x.new_zeros(()))


class RankOne(nn.Module):
    """The first singular directions of each change, each with a gate of its own."""

    def __init__(self, deltas: torch.Tensor, rank: int) -> None:
        """Keep of (T, out, in) the first `rank` directions each; what a matrix lacks of them is zero."""
        super().__init__()
        left, right = low_rank(deltas, rank)
        self.left = nn.Parameter(left.transpose(0, 1).flatten(1), requires_grad=False)  # (out, T rank)
        self.right = nn.Parameter(right.flatten(0, 1), requires_grad=False)  # (T rank, in)

    def mixed(self, gates: torch.Tensor) -> torch.Tensor:
        """(..., T rank) -> (..., out, in)."""
        return (self.left * gates[..., None, :]) @ self.right

    def applied(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """(B, N, in), (B, N or 1, T rank) -> (B, N, out)."""
        return linear(linear(x, self.right) * gates, self.left)


def low_rank(deltas: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of each of (T, m, n): left (T, m, rank), right (T, rank, n); beyond full rank zeros."""
    n_experts, m, n = deltas.shape
    left, right = deltas.new_zeros(n_experts, m, rank), deltas.new_zeros(n_experts, rank, n)
    kept = min(rank, m, n)
    if not deltas.is_meta and kept:
        u, s, vh = torch.linalg.svd(deltas.double(), full_matrices=False)
        left[..., :kept], right[:, :kept] = (u * s[:, None])[..., :kept].to(left), vh[:, :kept].to(right)
    return left, right


class MixedLinear(nn.Module):
    """A linear layer, base plus changes, mixed by the gates of the block that it is in."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, changes: nn.Module, held: Gates) -> None:
        """Take base (out, in) and (out,), and the changes."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.changes: Any = changes
        self._held = held
        self.bias_changes: nn.Parameter | None = None  # (T, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ..., in) -> (B, ..., out)."""
        gates, wide = self._held.now, x.reshape(len(x), -1, x.shape[-1])
        if gates.dim() == 1:
            found = linear(wide, self.weight + self.changes.mixed(gates))
        elif gates.dim() == 2 and not isinstance(self.changes, RankOne):
            found = torch.bmm(wide, (self.weight + self.changes.mixed(gates)).transpose(1, 2))
        else:
            own = gates[:, None] if gates.dim() == 2 else gates
            found = linear(wide, self.weight) + self.changes.applied(wide, own)
        if self.bias is not None:
            found = found + self.bias
        if self.bias_changes is not None:
            moved = gates @ self.bias_changes
            found = found + (moved[:, None] if gates.dim() == 2 else moved)
        return found.reshape(*x.shape[:-1], -1)
