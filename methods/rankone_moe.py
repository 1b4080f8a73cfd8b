"""RankOne-MoE: WE-MoE whose experts are the first singular directions of the feed-forward changes, each with a gate.

Source: FusionBench's `rankone_moe` (github.com/EnnengYang/RankOne-MoE); there is no paper.
Differs: routing is per example, padding does not count; `select` keeps an example's largest gates as they are, where
FusionBench scales them by a sigmoid around the smallest. As there, a block's layers share gates, and biases have
task arithmetic.
Formula: base + sum_i sum_k gate_ik(x) s_ik u_ik v_ik^T in feed-forward blocks, base + scale * sum_i delta_i elsewhere
Cost: an SVD for each of T matrices of each block; T rank (m + n) numbers for one of m x n
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.lazy import torch
from methods.parameters import at_least, tunable
from methods.we_moe import WeMoeParams

if TYPE_CHECKING:
    from methods.routed import Parts


@dataclass(frozen=True)
class RankoneMoeParams(WeMoeParams):
    """Parameters of `rankone_moe`; also the schema of conf/method/rankone_moe.yaml."""

    router_layers: int = 1  # linear layers of each router: 1 or 2
    rank: int = tunable(32, low=1, high=128, log=True)  # directions of each expert
    select: int | None = None  # directions that an example uses, of all experts' together; None: all

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("rank", self.rank, 1)
        if self.select is not None:
            at_least("select", self.select, 1)


def rankone_moe(
    base: torch.nn.Module, experts: Sequence[torch.nn.Module], params: RankoneMoeParams, roles: Parts
) -> torch.nn.Module:
    """The base module with merged weights, and singular directions mixed in each feed-forward block.

    Raises:
        ValueError: The architecture has no feed-forward blocks that the pool can name.
    """
    from methods.mixed_linear import RankOne
    from methods.routed import Routed, Router, network, route

    class Selected(Routed):
        """Of an example's gates the largest."""

        def gates(self, hidden_states: torch.Tensor) -> torch.Tensor:
            """(B, N, D) -> (B, G), most of them zero."""
            gates = super().gates(hidden_states)
            if params.select is None or params.select >= gates.shape[-1]:
                return gates
            places = gates.topk(params.select, dim=-1).indices
            return torch.zeros_like(gates).scatter(-1, places, gates.gather(-1, places))

    def entry(block, held, tokens, causal, masked, width):
        net = network(width, len(experts) * params.rank, params.router_layers, params.scale)
        return Selected(block, Router(net, len(experts)), held, tokens, causal, masked)

    return route(
        base, experts, roles, "rankone_moe", params.scale, lambda deltas: RankOne(deltas, params.rank), entry,
        gated_biases=False,
    )  # fmt: skip
