"""Arcee Fusion: the expert's weights where their change and their row's divergence are large, the base's elsewhere.

Source: none; mergekit 0.1.5 (`arcee_fusion`). A weight's importance is the magnitude of its change times the
Kullback-Leibler divergence of the softmax of its row, along the last axis; kept is what reaches the median plus 1.5
times the distance of the quartiles.
Differs: quantiles are exact for every size, so that the result is the same every time; mergekit draws a million entries
at random where there are more. Divergences are computed in float64, where mergekit's float32 cancels.
Formula: merged = base + [s >= median(s) + 1.5 (q3(s) - q1(s))] delta, s = |delta| KL(softmax(expert) || softmax(base))
Cost: O(n) time, 8 n numbers
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch

_FLOOR = 1e-8  # added to every probability
_ROWS = 1 << 17  # numbers in float64 at a time, at least a row


@dataclass(frozen=True)
class ArceeFusionParams:
    """`arcee_fusion` has no parameters."""


def arcee_fusion(base: torch.Tensor, experts: torch.Tensor, params: ArceeFusionParams) -> torch.Tensor:
    """Merge one tensor: base (*shape), the one expert (1, *shape) -> (*shape), all float32."""
    start, end = (tensor.reshape(-1, base.shape[-1] if base.dim() else 1) for tensor in (base, experts[0]))
    delta = end - start
    step = max(1, _ROWS // start.shape[1])
    parts = [_divergence(end[row : row + step], start[row : row + step]) for row in range(0, len(start), step)]
    importance = delta.abs().double().mul_(torch.cat(parts)[:, None]).flatten()
    first, middle, third = (_quantile(importance, share) for share in (0.25, 0.5, 0.75))
    kept = importance >= middle + 1.5 * (third - first)
    return delta.mul_(kept.reshape(delta.shape)).add_(start).reshape(base.shape)


def _divergence(end: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Of each row's softmax from the base's, (m, n) -> (m,) float64."""
    p, q = (torch.softmax(rows.double(), dim=1).add_(_FLOOR) for rows in (end, start))
    return (p * (p / q).log_()).sum(1)


def _quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    """The number below which a share of the others lies, one of them, (n,) -> ()."""
    return values.kthvalue(int(share * (len(values) - 1)) + 1).values
