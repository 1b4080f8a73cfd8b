"""WE-MoE: task arithmetic everywhere but in the feed-forward blocks, whose weights a router mixes for each input.

Source: Tang et al. 2024, arXiv:2402.00433, equations 5 to 8 and Algorithm 1.
Differs: nothing; routing is per example, where FusionBench mixes one set of weights for the whole batch.
Formula: base + sum_i gate_i(x) delta_i in feed-forward blocks, base + scale * sum_i delta_i elsewhere
Cost: T + 1 copies of the feed-forward blocks in memory; each training step a forward and backward pass
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.lazy import torch
from methods.parameters import Params, at_least, positive, tunable
from methods.primitives import add_up, average

if TYPE_CHECKING:
    from methods.kinds import Roles


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
    base: torch.nn.Module, experts: Sequence[torch.nn.Module], params: WeMoeParams, roles: Roles
) -> torch.nn.Module:
    """The base module with merged weights and a router in each feed-forward block; only routers are trainable.

    Raises:
        ValueError: The architecture has no feed-forward blocks that the pool can name.
    """
    from methods.mixtures import Routed

    blocks = roles.mlps()
    if not blocks:
        raise ValueError("we_moe mixes feed-forward blocks, and this architecture has none that the pool can name")
    routed = {
        path: Routed(base.get_submodule(path), [expert.get_submodule(path) for expert in experts], params)
        for path in blocks
    }
    _merge_in_place(base, experts, params.scale)
    for path, block in routed.items():
        base.set_submodule(path, block)
    return base


@torch.no_grad()
def _merge_in_place(base: torch.nn.Module, experts: Sequence[torch.nn.Module], scale: float) -> None:
    """Task arithmetic on every parameter of the base, none trainable afterwards; floating buffers are averaged."""
    theirs = [dict(expert.named_parameters()) for expert in experts]
    for name, parameter in base.named_parameters():
        deltas = torch.stack([parameters[name] - parameter for parameters in theirs])
        parameter.add_(add_up(deltas), alpha=scale).requires_grad_(False)
    statistics = [dict(expert.named_buffers()) for expert in experts]
    for name, buffer in base.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(average(torch.stack([buffers[name] for buffers in statistics])))
