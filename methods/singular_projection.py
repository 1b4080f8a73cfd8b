"""Singular projection: keep of an expert's change what lies in the base weight's leading directions, or what does not.

Source: Tang et al. 2024, arXiv:2408.10174 (SMILE), its analysis of where a change lies; as FusionBench has it.
Differs: nothing; the default chooses the rank by energy, a `rank` above a matrix is an error instead of cut silently.
What is no matrix is the expert's.
Formula: base = U S V^T; low: merged = base + U_k U_k^T (expert - base) V_k V_k^T; high: the same with the directions
from k + 1 on, which include those outside of the shorter side where null_space is true.
Cost: O(m n min(m, n)) time, 5 m n numbers besides the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Place
from methods.lazy import torch
from methods.matrices import as_matrix, check_rank_of
from methods.parameters import Params, at_least, one_of, share, tunable, word
from methods.spectra import Leading, covering, leading, one_thread, project


@dataclass(frozen=True)
class SingularProjectionParams(Params):
    """Parameters of `singular_projection`; also the schema of conf/method/singular_projection.yaml."""

    part: str = tunable("low", choices=("low", "high"))  # low: the leading directions; high: the remaining ones
    rank: int | None = None  # how many directions lead, at least 1 and at most min(m, n); null: as `energy` says
    energy: float = share(0.5, low=0.1, high=0.95)  # share of the sum of the base's singular values, in (0, 1]
    null_space: bool = True  # high: whether directions beyond the shorter side's number belong to it
    matrices: str = word("linear", "all", "conv")  # what is a matrix: all, linear or conv; methods/matrices.py

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("part", self.part, ("low", "high"))
        if self.rank is not None:
            at_least("rank", self.rank, 1)


@one_thread
def singular_projection(
    base: torch.Tensor, experts: torch.Tensor, params: SingularProjectionParams, *, place: Place
) -> torch.Tensor:
    """Merge one tensor: base (*shape), one expert (1, *shape) -> (*shape), all float32.

    Raises:
        RankError: `rank` is above min(m, n).
    """
    weight = as_matrix(base, place, params.matrices)
    if weight is None:
        return experts[0].clone()
    if params.rank is not None:
        check_rank_of("rank", params.rank, weight.shape)
    found = leading(weight, params.rank or (lambda values: covering(values, params.energy)))
    delta = (experts[0] - base).reshape(weight.shape).to(found.u.dtype)
    if params.part == "low":
        delta = _both(delta, found)
    else:
        delta = delta - project(delta, found.u)
        delta -= project(delta.mT, found.v).mT
        if not params.null_space:
            delta = _both(delta, leading(weight, min(weight.shape)))
    return base + delta.float().reshape(base.shape)


def _both(delta: torch.Tensor, onto: Leading) -> torch.Tensor:
    """What of a matrix lies in the directions on both sides: U U^T delta V V^T."""
    return project(project(delta, onto.u).mT, onto.v).mT
