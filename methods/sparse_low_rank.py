"""Sparse plus low rank: each matrix is stored as some of its entries and the leading directions of what they leave.

Source: Zhou and Tao 2011 (GoDec, ICML), Algorithm 1, of weights as Zhang and Papyan 2024, arXiv:2409.13652, section 2,
without the inputs' scales there (solver=anew). FusionBench's SparseLo, which chooses entries once, at random, by
magnitude or by inputs (Wanda, Sun et al. 2023, arXiv:2306.11695, equation 1): solver=once, with one step or several;
solver=pursuit for its PCP, by Candes et al. 2011, arXiv:0912.3599, Algorithm 1, whose sparse part keeps to the entries
that were chosen.
Differs: entries come first and directions last, as SparseLo has it. The pursuit's l1 norm is that of the entries, where
FusionBench takes the largest column's; what it finds is cut to the rank before entries make up for it. Inputs are those
of the expert as it is, layers before it not yet compressed. What is restored is a whole matrix again: prune/sparsity is
that of the sparse part alone, and how small all parts are is told by compression/bits_per_parameter. A rank above a
matrix's shorter side is that. What is no matrix of a linear layer is stored as each expert's own change.
Formula: A_t = base + S_t + L_t (of=weights: S_t + L_t); steps times S = chosen of A - L, L = rank-r part of A - S;
pursuit: one such step, whose first L is the rank-r part of that of min ||L||_* + ||S||_1 / sqrt(max(m, n)), L + S = A
Cost: O(steps T m n min(m, n)) time, 7 m n numbers; stored: m n bits and density m n + rank (m + n) numbers an expert
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.kinds import Place
from methods.lazy import torch
from methods.low_rank import approximate
from methods.packing import PackingParams, from_bits, stored, to_bits
from methods.parameters import at_least, tunable, word
from methods.prune import PruningParams, as_rows, chosen, is_pruned
from methods.spectra import leading
from methods.wanda import gram_of

if TYPE_CHECKING:
    from methods.kinds import Draw

_Scores = Callable[["torch.Tensor"], "torch.Tensor"]  # what the entries of a matrix (out, in) count, (out, in)


@dataclass(frozen=True)
class SparseLowRankParams(PruningParams, PackingParams):
    """Parameters of `sparse_low_rank`; also the schema of conf/method/sparse_low_rank.yaml."""

    expert: str | None = None  # the one expert to write, restored; null keeps all, packed
    rank: int = tunable(16, low=1, high=128, log=True)  # directions that are kept besides the entries
    steps: int = tunable(10, low=1, high=80, log=True)  # how often entries and directions are found in turn
    solver: str = word("anew", "once", "pursuit")  # entries are chosen in each step, or once; by the convex problem
    of: str = word("change", "weights")  # what is stored so: the experts' changes, or their weights
    scope: str = word("row", "tensor")  # keep the share of each output's entries, or of each tensor's

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("rank", self.rank, 1)
        at_least("steps", self.steps, 1)


@dataclass(frozen=True)
class SparseLowRankRandomParams(SparseLowRankParams):
    """Parameters of `sparse_low_rank_random`; also the schema of conf/method/sparse_low_rank_random.yaml."""


@dataclass(frozen=True)
class SparseLowRankWandaParams(SparseLowRankParams):
    """Parameters of `sparse_low_rank_wanda`; also the schema of conf/method/sparse_low_rank_wanda.yaml."""


def sparse_low_rank(
    base: torch.Tensor,
    experts: torch.Tensor,
    params: SparseLowRankParams,
    *,
    place: Place,
    draw: Draw | None = None,
    stats: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What is stored for one tensor: base (*shape), experts (T, *shape) -> `masks`, `values`, `left` and `right`.

    They are (T, bytes), (T, kept), (T, out, r) and (T, r, in). What is not packed has its `changes`. Entries count by
    magnitude, with Gram matrices `stats` (T, in, in) times the inputs' norms, with `draw` at random.
    """
    if not is_pruned(base.shape, place, params):
        return {"changes": stored(experts - base, params)}
    parts = []
    for index, expert in enumerate(experts):
        matrix = as_rows(expert if params.of == "weights" else expert - base, place)
        parts.append(_decomposed(matrix, _scores(matrix, index, params, place, draw, stats), params))
    masks, values, left, right = zip(*parts, strict=True)
    numbers = {"values": values, "left": left, "right": right}
    packed = {name: stored(torch.stack(own), params) for name, own in numbers.items()}
    return {"masks": to_bits(torch.stack(masks)), **packed}


def restore(
    base: torch.Tensor,
    packed: Mapping[str, torch.Tensor],
    index: int,
    params: SparseLowRankParams,
    *,
    place: Place,
    **extras: Any,
) -> torch.Tensor:
    """One expert's tensor: base (*shape) -> (*shape) float32."""
    if "changes" in packed:
        return base + packed["changes"][index].to(base)
    rows = as_rows(base, place)
    mask = from_bits(packed["masks"][index], rows).bool()
    found = packed["left"][index].to(base) @ packed["right"][index].to(base)
    found += torch.zeros_like(found).masked_scatter_(mask, packed["values"][index].to(base))
    return as_rows(found if params.of == "weights" else found + rows, place)


def entries(packed: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Of what is stored for one tensor: entries of the sparse parts that are not zero, and all of these."""
    if "values" not in packed:
        return 0, 0
    size = packed["left"].shape[-2] * packed["right"].shape[-1] * len(packed["left"])
    return int(torch.count_nonzero(packed["values"])), size


def _scores(
    matrix: torch.Tensor,
    index: int,
    params: SparseLowRankParams,
    place: Place,
    draw: Draw | None,
    stats: torch.Tensor | None,
) -> _Scores:
    """By what an expert's entries are chosen."""
    if draw is not None:
        chances = as_rows(draw(index), place)
        return lambda rest: chances
    if stats is None:
        return torch.abs
    norms = gram_of(stats[index : index + 1], matrix, params).diagonal().clamp(min=0).sqrt()
    return lambda rest: rest.abs() * norms


def _decomposed(matrix: torch.Tensor, scores: _Scores, params: SparseLowRankParams) -> tuple[torch.Tensor, ...]:
    """Mask (out, in), entries (kept,), directions (out, r) and (r, in) of a matrix."""
    rank, steps = min(params.rank, *matrix.shape), params.steps
    mask = chosen(scores(matrix), params, params.scope)
    low = torch.zeros_like(matrix)
    if params.solver == "pursuit":
        found = approximate(pursued(matrix, mask, steps), rank)
        low, steps = found.left @ found.right, 1
    for step in range(steps):
        rest = matrix - low
        if step and params.solver == "anew":
            mask = chosen(scores(rest), params, params.scope)
        sparse = rest.where(mask, 0.0)
        found = approximate(matrix - sparse, rank)
        low = found.left @ found.right
    return mask, sparse[mask], found.left, found.right


def pursued(matrix: torch.Tensor, mask: torch.Tensor, steps: int) -> torch.Tensor:
    """The low-rank part by principal component pursuit, the sparse part within a mask: (m, n), bool (m, n) -> (m, n).

    Alternating directions on the augmented Lagrangian, its penalty fixed at m n / (4 sum |matrix|).
    """
    total = float(matrix.abs().sum())
    low, sparse, dual = (torch.zeros_like(matrix) for _ in range(3))
    if total == 0:
        return low
    penalty = matrix.numel() / (4 * total)
    least = 1 / (penalty * max(matrix.shape) ** 0.5)
    for _ in range(steps):
        u, s, v = leading(matrix - sparse + dual / penalty, min(matrix.shape))
        low = ((u * (s - 1 / penalty).clamp(min=0)) @ v.mT).to(matrix)
        sparse = torch.nn.functional.softshrink(matrix - low + dual / penalty, least).where(mask, 0.0)
        dual += penalty * (matrix - low - sparse)
    return low
