"""WE-MoE: task arithmetic everywhere but in the feed-forward blocks, whose weights a router mixes for each input.

Source: Tang et al. 2024, arXiv:2402.00433, equations 5 to 8 and Algorithm 1.
Differs: routing is per example, where FusionBench mixes one set of weights for the whole batch; padding does not count;
in a causal block, which the paper does not have, the gates of a token average over the tokens up to it.
Formula: base + sum_i gate_i(x) delta_i in feed-forward blocks, base + scale * sum_i delta_i elsewhere
Cost: T + 1 copies of the feed-forward blocks in memory; each training step a forward and backward pass
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.lazy import torch
from methods.parameters import Params, at_least, positive, tunable

if TYPE_CHECKING:
    from methods.routed import Parts


@dataclass(frozen=True)
class WeMoeParams(Params):
    """Parameters of `we_moe`; also the schema of conf/method/we_moe.yaml."""

    scale: float = tunable(0.3, low=0.0, high=1.0)  # of task arithmetic, and what each gate starts from
    router_layers: int = 2  # linear layers of each router: 1 or 2
    lr: float = tunable(1e-4, low=1e-5, high=1e-2, log=True)  # Adam's learning rate for the routers
    steps: int = 1000  # updates

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_layers not in (1, 2):
            raise ValueError(f"router_layers is 1 or 2, got {self.router_layers}")
        positive("lr", self.lr)
        at_least("steps", self.steps, 1)


def we_moe(
    base: torch.nn.Module, experts: Sequence[torch.nn.Module], params: WeMoeParams, roles: Parts
) -> torch.nn.Module:
    """The base module with merged weights and a router in each feed-forward block; only routers are trainable.

    Raises:
        ValueError: The architecture has no feed-forward blocks that the pool can name.
    """
    from methods.mixed_linear import Dense
    from methods.routed import Routed, Router, network, route

    def entry(block, held, tokens, causal, masked, width):
        net = network(width, len(experts), params.router_layers, params.scale)
        return Routed(block, Router(net, len(experts)), held, tokens, causal, masked)

    return route(base, experts, roles, "we_moe", params.scale, Dense, entry)
