"""Magnitudes in order, kept: the k-th largest for any share is then a look-up, as for a search over densities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from methods.lazy import torch
from methods.selection import count_kept


@dataclass(frozen=True)
class Ranked:
    """Every expert's magnitudes over the whole model, (T, N) float32, ascending."""

    magnitudes: torch.Tensor

    def kth_largest(self, density: float | Sequence[float]) -> torch.Tensor:
        """Magnitude of the last entry that each expert keeps, (T,) float32, as `selection.kth_largest` finds it."""
        n_experts, n = self.magnitudes.shape
        shares = [density] * n_experts if isinstance(density, int | float) else list(density)
        if len(shares) != n_experts:
            raise ValueError(f"densities lists {len(shares)} numbers for {n_experts} experts; give one for each")
        places = [n - count_kept(share, n) for share in shares]
        return self.magnitudes[torch.arange(n_experts), places].cpu()


def rank(pieces: Iterable[torch.Tensor]) -> Ranked:
    """Put the magnitudes of all pieces, each (T, ...), in order.

    >>> rank([torch.tensor([[3.0, -1.0]]), torch.tensor([[-2.0]])]).kth_largest(0.67)
    tensor([2.])
    """
    magnitudes = torch.cat([piece.abs().flatten(1) for piece in pieces], dim=1)
    for row in magnitudes:
        row.copy_(row.sort().values)
    return Ranked(magnitudes)
