"""SMILE: every linear layer of the base with low-rank experts, the changes of fine-tuning, chosen for each token.

Source: Tang et al. 2024, arXiv:2408.10174, equation 9 for the router: its logit for an expert is the length of the
token's projection on the leading right singular vectors of the expert's change. No data, no training.
Differs: a direction that a change does not have is 0, where FusionBench routes by arbitrary ones. A router looks at no
more than half as many directions as inputs: on all of them a token is as long for every expert, and rounding would
choose. Router and expert share their singular vectors instead of keeping them twice. Only the blocks' linear layers
have experts, as in FusionBench for language models; what is none is the base's, with `average_rest` the experts' mean.
Formula: W x + b + sum_i gate_i (U_i S_i V_i^T x + b_i - b), gate = softmax of the top_k of ||V_i[:, :gate_k]^T x||
Cost: O(T m n min(m, n)) time for an m x n layer; T max(k, gate_k) n + T k m numbers besides it, and the experts while
it is built; each token costs T max(k, gate_k) n + top_k k m multiplications more
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from methods.lazy import torch
from methods.parameters import Params, at_least, tunable

if TYPE_CHECKING:
    from methods.routed import Parts


@dataclass(frozen=True)
class SmileParams(Params):
    """Parameters of `smile`; also the schema of conf/method/smile.yaml."""

    k: int = tunable(32, low=1, high=128, log=True, published=(128,))  # rank of the experts, cut to a layer's own
    gate_k: int = tunable(
        16, low=1, high=128, log=True, published=(1, 8)
    )  # directions of each expert that route, at most half of the inputs
    top_k: int = 1  # experts that a token is sent to, 1 to as many as there are
    average_rest: bool = False  # what is no linear layer of a block is the experts' mean; false: the base's

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "gate_k", "top_k"):
            at_least(name, getattr(self, name), 1)


def smile(
    base: torch.nn.Module, experts: Sequence[torch.nn.Module], params: SmileParams, roles: Parts
) -> torch.nn.Module:
    """The base module, its blocks' linear layers replaced; nothing is trainable.

    Raises:
        ValueError: The router is asked for more experts than there are, or there are no linear layers in blocks.
    """
    from methods.low_rank_experts import Smile

    if params.top_k > len(experts):
        raise ValueError(f"top_k={params.top_k} sends a token to more experts than there are, {len(experts)}")
    layers = [path for path, module in base.named_modules() if _in_block(path, module, roles)]
    if not layers:
        kind = type(base).__name__
        raise ValueError(f"smile gives experts to linear layers (nn.Linear) of blocks, and this {kind} has none")
    made = {}
    for path in layers:
        own, *theirs = (cast("torch.nn.Linear", module.get_submodule(path)) for module in (base, *experts))
        made[path] = Smile(own, theirs, params)
    base.requires_grad_(False)
    for path, layer in made.items():
        base.set_submodule(path, layer)
    if params.average_rest:
        _average(base, experts, roles)
    return base


def _in_block(path: str, module: torch.nn.Module, roles: Parts) -> bool:
    """Whether a module is a plain linear layer in one of the blocks; where there are none, anywhere."""
    weight = f"{path}.weight"
    if type(module) is not torch.nn.Linear or not roles.is_linear(weight):
        return False
    return not roles.n_layers or 1 <= roles.layer_of(weight) <= roles.n_layers


@torch.no_grad()
def _average(base: torch.nn.Module, experts: Sequence[torch.nn.Module], roles: Parts) -> None:
    """Bring what is merged, but for the layers with experts, and floating buffers to the experts' mean."""
    from methods.low_rank_experts import Smile

    inside = {path for path, module in base.named_modules() if isinstance(module, Smile)}
    theirs = [dict([*expert.named_parameters(), *expert.named_buffers()]) for expert in experts]
    buffers = [(name, buffer) for name, buffer in base.named_buffers() if buffer.is_floating_point()]
    merged = [(name, tensor) for name, tensor in base.named_parameters() if roles.is_merged(name)]
    for name, tensor in [*merged, *buffers]:
        if name.rpartition(".")[0] not in inside:
            first = theirs[0][name]
            tensor.copy_(first + torch.stack([their[name] - first for their in theirs]).mean(0))
