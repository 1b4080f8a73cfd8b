"""TSV-C: every matrix of every expert's change is stored as its leading singular directions, a T-th of them each.

Source: Gargiulo et al. 2025, arXiv:2412.00081, section 4 (task singular vectors for compression).
Differs: nothing; at least one direction is kept. What is no matrix is stored as each expert's own change. FusionBench's
per-task models are blocks of factors made orthogonal for merging, which this is not.
Formula: restored_t = base + U_t[:, :k] diag(s_t[:k]) V_t[:, :k]', k = max(1, floor(share * min(m, n)))
Cost: O(T m n min(m, n)) time, m n + min(m, n)^2 float64 numbers; stored: T k (m + n) numbers for each matrix
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from methods.kinds import Place
from methods.lazy import torch
from methods.low_rank import approximate
from methods.matrices import as_matrices
from methods.packing import PackingParams, stored
from methods.parameters import in_unit_interval, word


@dataclass(frozen=True)
class TsvCompressParams(PackingParams):
    """Parameters of `tsv_compress`; also the schema of conf/method/tsv_compress.yaml."""

    share: float | None = None  # of each matrix's ranks kept, in (0, 1]; null for one over the number of experts
    matrices: str = word("all", "linear", "conv")  # what is a matrix: methods/matrices.py

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None:
            in_unit_interval("share", self.share)


def tsv_compress(
    base: torch.Tensor, experts: torch.Tensor, params: TsvCompressParams, *, place: Place
) -> dict[str, torch.Tensor]:
    """What is stored for one tensor: base (*shape), experts (T, *shape) -> `left` and `right`, or `changes`.

    They are (T, m, k) and (T, k, n); the singular values are in both, by their square roots.
    """
    deltas = experts - base
    laid = as_matrices(deltas, place, params.matrices)
    if laid is None:
        return {"changes": stored(deltas, params)}
    ranks, n_experts = min(laid.shape[1:]), len(experts)
    rank = ranks // n_experts if params.share is None else int(params.share * ranks + 1e-9)
    found = [approximate(delta, max(1, rank)) for delta in laid]
    return {
        "left": stored(torch.stack([one.left for one in found]), params),
        "right": stored(torch.stack([one.right for one in found]), params),
    }


def restore(
    base: torch.Tensor, packed: Mapping[str, torch.Tensor], index: int, params: TsvCompressParams, *, place: Place
) -> torch.Tensor:
    """One expert's tensor: base (*shape) -> (*shape) float32."""
    if "changes" in packed:
        return base + packed["changes"][index].to(base)
    left, right = packed["left"][index].to(base), packed["right"][index].to(base)
    return base + (left @ right).reshape(base.shape)
