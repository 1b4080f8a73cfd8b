"""DAWE: the whole model is merged anew for each example, by gates that a small network reads off the example.

Source: FusionBench's `dawe` (data-adaptive weight ensembling), merge mode task_wise; there is no paper.
Differs: the gates are read off the frozen base's own features, where FusionBench takes another network's (a ResNet-18);
they are not averaged over a batch. Of a text a causal model's gates see all that it is given: of a continuation the
prompt, but of a text that is scored its answer too.
Formula: theta(x) = base + sum_i gate_i(x) delta_i, gate(x) = network(features of x)
Cost: T + 1 models in memory; O(T n) time and a forward pass for each example, another for its features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.lazy import torch
from methods.parameters import tunable
from methods.we_moe import WeMoeParams

if TYPE_CHECKING:
    from methods.routed import Parts


@dataclass(frozen=True)
class DaweParams(WeMoeParams):
    """Parameters of `dawe`; also the schema of conf/method/dawe.yaml."""

    scale: float = tunable(0.3, low=0.0, high=1.0)  # what each gate starts from
    lr: float = tunable(1e-5, low=1e-6, high=1e-2, log=True)  # Adam's learning rate for the network


def dawe(
    base: torch.nn.Module, experts: Sequence[torch.nn.Module], params: DaweParams, roles: Parts
) -> torch.nn.Module:
    """A module that holds the base and all changes; only the network that gives the gates is trainable."""
    from methods.mixtures import PerExample, changes_of
    from methods.routed import Router, network

    net = network(roles.n_features, len(experts), params.router_layers, params.scale)
    return PerExample(base, changes_of(base, experts, roles), Router(net, len(experts)), roles)
