"""TALL masks: one multi-task vector, and for each expert a mask of the entries that are mostly its own.

Source: Wang et al. 2024, arXiv:2405.07813, section 4 (masks with lambda, on the sum of the task vectors).
Differs: an entry just at the threshold is masked out. FusionBench's algorithm hands changes where its mask takes
weights, and so masks something else; its function for masks is as here.
Formula: m = scale * sum_i delta_i; restored_t = base + mask_t * m, mask_t = [|delta_t| > selectivity * |m - delta_t|]
Cost: O(T n) time, T + 4 pieces of memory; stored: n numbers and T n bits
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from methods.lazy import torch
from methods.packing import PackingParams, from_bits, stored, to_bits
from methods.parameters import at_least, per_expert, tunable
from methods.primitives import changes
from methods.primitives import tall_mask as mostly_own


@dataclass(frozen=True)
class TallMaskParams(PackingParams):
    """Parameters of `tall_mask`; also the schema of conf/method/tall_mask.yaml."""

    selectivity: float = tunable(0.4, low=0.2, high=0.6, published=(0.2, 0.6))  # lambda, >= 0: the larger, the fewer
    selectivities: list[float] | None = None  # one for each expert, in the place of `selectivity`; null for that
    scale: float = tunable(1.0, low=0.1, high=1.5)  # multiplies the summed changes

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("selectivity", self.selectivity, 0)
        if self.selectivities is not None:
            for value in self.selectivities:
                at_least("selectivities", value, 0)


def tall_mask(base: torch.Tensor, experts: torch.Tensor, params: TallMaskParams) -> dict[str, torch.Tensor]:
    """What is stored for one tensor: base (*shape), experts (T, *shape) -> `multi` (*shape), `masks` (T, bytes).

    Raises:
        ValueError: There are not as many selectivities as experts.
    """
    selectivities = per_expert("selectivities", params.selectivities or params.selectivity, len(experts))
    multi = changes(base, experts).mul_(params.scale)
    masks = [
        to_bits(mostly_own(expert - base, multi, selectivity)[None])
        for expert, selectivity in zip(experts, selectivities, strict=True)
    ]
    return {"multi": stored(multi, params), "masks": torch.cat(masks)}


def restore(base: torch.Tensor, packed: Mapping[str, torch.Tensor], index: int, params: TallMaskParams) -> torch.Tensor:
    """One expert's tensor: base (*shape) -> (*shape) float32."""
    return base + from_bits(packed["masks"][index], base).mul_(packed["multi"].to(base))
