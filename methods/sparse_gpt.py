"""SparseGPT: weights go to zero input by input, and those of the inputs to come make up for what is lost.

Source: Frantar and Alistarh 2023, arXiv:2301.00774, Algorithm 1 and sections 3.2 and 3.3 (masks chosen in blocks);
block of layers after block, each fed what the pruned ones before it make.
Differs: of several experts the mean is pruned, by the mean of their Gram matrices; `expert` names one. The share asked
is met over the tensor, not in each block alone, and n:m where it is asked, where FusionBench always prunes 2 of 4; of
n:m n are kept. An input that is never active goes first, since it costs nothing, but not all of its weights at once.
Inverted in float64. Inputs are those of the experts' tasks. What is not pruned is the mean.
Formula: for each input j in turn: w_q -= w_j [H^-1]_jq / [H^-1]_jj for q >= j, of rows i whose w_ij^2 / [H^-1]_jj is
among the least of the block's; H^-1 of the inputs from j on, H = X^T X + damp * mean diagonal * I
Cost: O(n^3 + m n^2) time for m x n, T n^2 float32 and 3 n^2 + 2 m n float64 numbers; inputs as `wanda`
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from methods.kinds import Place
from methods.lazy import torch
from methods.parameters import at_least, positive, tunable, word
from methods.primitives import average
from methods.prune import PruningParams, as_rows, is_pruned, largest
from methods.selection import count_kept
from methods.wanda import gram_of


@dataclass(frozen=True)
class SparseGptParams(PruningParams):
    """Parameters of `sparse_gpt`; also the schema of conf/method/sparse_gpt.yaml."""

    scope: str = word("tensor", "row")  # in a block of inputs, keep the share of all weights, or of each output's
    block: int = 128  # inputs whose mask is chosen together; with n:m the next smaller multiple of m, m at least
    damp: float = tunable(0.01, low=1e-4, high=1.0, log=True)  # times the mean diagonal, added to the diagonal

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("block", self.block, 1)
        positive("damp", self.damp)


def sparse_gpt(
    base: torch.Tensor | None,
    experts: torch.Tensor,
    params: SparseGptParams,
    *,
    stats: torch.Tensor | None,
    place: Place,
) -> torch.Tensor:
    """Prune one tensor: experts (T, *shape), Gram matrices `stats` (T, in, in) -> (*shape), float32.

    Raises:
        ValueError: What is pruned has no Gram matrices, or they are not (in, in).
    """
    mean = average(experts)
    if not is_pruned(mean.shape, place, params):
        return mean
    weights = as_rows(mean, place)
    factor = _factor(gram_of(stats, weights, params).double(), params.damp)
    weights = weights.to(torch.float64, copy=True)
    step = params.block if not params.n else max(1, params.block // params.m) * params.m
    for start in range(0, weights.shape[1], step):
        stop = min(start + step, weights.shape[1])
        errors = _swept(weights[:, start:stop], factor[start:stop, start:stop], params, start)
        weights[:, stop:] -= errors @ factor[start:stop, stop:]
    return as_rows(weights.float(), place)


def _factor(gram: torch.Tensor, damp: float) -> torch.Tensor:
    """The upper Cholesky factor U of the damped inverse: U_jj^2 is [H^-1]_jj of the inputs from j on, (in, in)."""
    size = float(gram.diagonal().mean())
    gram.diagonal().add_(damp * size if size > 0 else 1.0)  # all zero: by magnitude
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)


def _swept(weights: torch.Tensor, factor: torch.Tensor, params: SparseGptParams, start: int) -> torch.Tensor:
    """Prune a block of inputs in place, (out, b), factor (b, b); returns what the inputs behind make up, (out, b)."""
    scales, width = factor.diagonal(), weights.shape[1]
    errors = torch.empty_like(weights)
    kept = torch.empty_like(weights, dtype=torch.bool)
    if not params.n:
        kept = _share((weights / scales).abs_(), params, start)
    for column in range(width):
        if params.n and column % params.m == 0:
            group = slice(column, min(column + params.m, width))
            scores = (weights[:, group] / scales[group]).abs_()
            kept[:, group] = largest(scores, math.ceil(params.n * scores.shape[1] / params.m))
        lost = weights[:, column].masked_fill(kept[:, column], 0.0)
        weights[:, column].masked_fill_(~kept[:, column], 0.0)
        errors[:, column] = lost / scales[column]
        weights[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
    return errors


def _share(scores: torch.Tensor, params: SparseGptParams, start: int) -> torch.Tensor:
    """Which weights of a block are kept, (out, b): as many as make up the share of all inputs up to it."""
    rows = scores.reshape(1, -1) if params.scope == "tensor" else scores
    each = rows.shape[1] // scores.shape[1]  # weights of one input in a row
    before = count_kept(params.density, start * each) if start else 0
    return largest(rows, count_kept(params.density, start * each + rows.shape[1]) - before).reshape(scores.shape)
