"""Depth up-scaling: one model's blocks stacked twice, without the last of the first copy and the first of the second.

Source: Kim et al. 2023, arXiv:2312.15166 (SOLAR 10.7B), section 2: n blocks become 2 (n - m), the seam between block
n - m - 1 and block m.
Differs: nothing with the defaults; `layers` lists the blocks of the result one by one instead, as FusionBench does.
The layers are stacked by the pool (its slices), of the one expert, or of the base where there is none (experts=[]).
Formula: blocks 0 ... n - m - 1, m ... n - 1 of the model
Cost: O(n) time, 2 chunks of memory
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch


@dataclass(frozen=True)
class DepthUpscalingParams:
    """Parameters of `depth_upscaling`; also the schema of conf/method/depth_upscaling.yaml."""

    dropped: int = 8  # m: blocks left out of each copy at the seam, at least 0 and fewer than there are
    layers: list[int] | None = None  # numbers of the blocks from the first to the last of the result; null for the seam

    def __post_init__(self) -> None:
        if self.dropped < 0:
            raise ValueError(f"dropped is a number of blocks, at least 0, got {self.dropped}")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"layers lists numbers of blocks from 0, at least one of them, got {list(self.layers)}")


def ranges(params: DepthUpscalingParams) -> list[list[int | None]]:
    """The ranges of blocks that are stacked, half-open; what is negative counts from the end, None is the end.

    >>> ranges(DepthUpscalingParams(dropped=2)), ranges(DepthUpscalingParams(layers=[0, 1, 1]))
    ([[0, -2], [2, None]], [[0, 2], [1, 2]])
    """
    if params.layers is None:
        return [[0, -params.dropped or None], [params.dropped, None]]
    found: list[list[int | None]] = []
    for layer in params.layers:
        if found and found[-1][1] == layer:
            found[-1][1] = layer + 1
        else:
            found.append([layer, layer + 1])
    return found


def depth_upscaling(base: torch.Tensor | None, experts: torch.Tensor, params: DepthUpscalingParams) -> torch.Tensor:
    """The tensor of the model that was stacked anew, (1, *shape) -> (*shape), float32."""
    return experts[0].clone()
