"""RegMean++: RegMean with inputs that have come through the layers merged before, one block after the other.

Source: Nguyen et al. 2025, arXiv:2508.03121, section 4: block l of each expert is fed what the merged blocks before it
make of that expert's inputs; what lies before the blocks is averaged.
Differs: solved with a ridge like `regmean`; what lies behind the blocks is merged like a block, where the authors' code
leaves it as it was before fine-tuning. Statistics that are given (`merge_state_dicts`) are used as they are: the merge
is then RegMean's own, since only a run can feed a block what the merged ones before it make.
Formula: merged^T = (sum_i G_i)^-1 sum_i G_i expert_i^T, G_i of block l's inputs behind merged blocks 1 to l - 1
Cost: as regmean; its Gram matrices take L forward passes for each example, L the blocks, and are held for one at a time
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.lazy import torch
from methods.parameters import tunable
from methods.regmean import RegmeanParams, regmean


@dataclass(frozen=True)
class RegmeanPlusplusParams(RegmeanParams):
    """Parameters of `regmean_plusplus`; also the schema of conf/method/regmean_plusplus.yaml."""

    off_diagonal: float = tunable(0.95, low=0.0, high=1.0)  # multiplies what is off the diagonal (alpha), in [0, 1]


def regmean_plusplus(
    base: torch.Tensor | None, experts: torch.Tensor, params: RegmeanPlusplusParams, *, stats: torch.Tensor | None
) -> torch.Tensor:
    """Merge one tensor: experts (T, out, in) with Gram matrices `stats` (T, in, in) -> (out, in); others averaged.

    Raises:
        ValueError: The Gram matrices are not of the shape (in, in).
    """
    return regmean(base, experts, params, stats=stats)
