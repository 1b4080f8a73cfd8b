"""E-WEMoE: WE-MoE with the largest entries of each feed-forward change only, and one router for all blocks.

Source: Shen et al. 2024, arXiv:2410.21804, section 4 (efficient-and-effective WE-MoE).
Differs: each tensor of each expert is pruned to the density on its own; routing is per example, padding does not count;
biases are not pruned; with shared=false every block has a router of its own.
Formula: base + sum_i gate_i(x) top(delta_i) in feed-forward blocks, base + scale * sum_i delta_i elsewhere
Cost: 1 + 3 T density copies of the feed-forward blocks (an entry and its place); each training step a forward and
backward pass
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.lazy import torch
from methods.parameters import share
from methods.we_moe import WeMoeParams

if TYPE_CHECKING:
    from methods.routed import Parts


@dataclass(frozen=True)
class SparseWeMoeParams(WeMoeParams):
    """Parameters of `sparse_we_moe`; also the schema of conf/method/sparse_we_moe.yaml."""

    density: float = share(0.1, low=0.01, high=1.0, log=True)  # share of each change's entries that is kept
    shared: bool = True  # one router for all blocks


def sparse_we_moe(
    base: torch.nn.Module, experts: Sequence[torch.nn.Module], params: SparseWeMoeParams, roles: Parts
) -> torch.nn.Module:
    """The base module with merged weights, and sparse changes mixed in each feed-forward block.

    Raises:
        ValueError: The architecture has no feed-forward blocks that the pool can name, or blocks of several widths and
            one router for all.
    """
    from methods.mixed_linear import Sparse
    from methods.routed import Routed, Router, network, route

    routers: dict[int, Router] = {}

    def entry(block, held, tokens, causal, masked, width):
        if params.shared and routers and width not in routers:
            raise ValueError(
                f"sparse_we_moe shares one router, and blocks are {next(iter(routers))} and {width} wide: shared=false"
            )
        router = routers.get(width) if params.shared else None
        if router is None:
            router = Router(network(width, len(experts), params.router_layers, params.scale), len(experts))
            routers[width] = router
        return Routed(block, router, held, tokens, causal, masked)

    return route(
        base, experts, roles, "sparse_we_moe", params.scale, lambda deltas: Sparse(deltas, params.density), entry
    )
