"""Search without gradients, handed to the methods that ask for it: CMA-ES, by the library that studies use as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from cmaes import CMA

_SEEDS = 2**32  # the library's seeds are below


class CmaEs:
    """CMA-ES (Hansen & Ostermeier 2001) around a start within [-bound, bound]; see `methods.lorahub.Sampler`."""

    def __init__(self, start: Sequence[float], spread: float, bound: float, seed: int) -> None:
        """Take the start, (N,) with N at least 2, the first deviation, the bound and the seed of what is drawn."""
        limits = np.tile([-bound, bound], (len(start), 1))
        self._search = CMA(mean=np.array(start, dtype=float), sigma=spread, bounds=limits, seed=seed % _SEEDS)

    @property
    def population(self) -> int:
        """Points of a generation."""
        return self._search.population_size

    def ask(self) -> torch.Tensor:
        """A point, (N,) float32."""
        return torch.tensor(self._search.ask(), dtype=torch.float32)

    def tell(self, points: Sequence[torch.Tensor], losses: Sequence[float]) -> None:
        """The losses of a generation."""
        self._search.tell([(point.double().numpy(), loss) for point, loss in zip(points, losses, strict=True)])


def cma_es(seed: int) -> Callable[[Sequence[float], float, float], CmaEs]:
    """What a method makes its search with: (start, spread, bound) -> search."""
    return lambda start, spread, bound: CmaEs(start, spread, bound, seed)
