"""What mixtures of experts show of their inputs: how strong each input of each expert is, by the router's share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from harness.examples import Examples, Texts
from harness.execute import sum_over_devices
from harness.inputs import MergeError
from pools.moe_targets import MIXTURES, Target


def routed_squares(
    fabric: Fabric, module: Any, examples: Examples | Texts, batch_size: int, wanted: Callable[[str], bool]
) -> dict[str, torch.Tensor]:
    """Mean squares of what enters linear layers, of experts times the router's share, weight's name -> (in,).

    The mean is over all tokens; those that an expert does not see count as zeros there.

    Raises:
        MergeError: The model is no mixture of experts that is known.
    """
    from harness.adapt import _show_inputs  # it lists this

    kind = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
    if kind not in MIXTURES:
        raise MergeError(f"inputs of experts are asked for, and a {kind} has none; such are {', '.join(MIXTURES)}")
    target = MIXTURES[kind]
    blocks = {path: part for path, part in module.named_modules() if hasattr(part, "gate") and hasattr(part, "experts")}
    plain = {f"{path}.weight": part for path, part in module.named_modules() if isinstance(part, nn.Linear)}
    watched = {path: part for path, part in (blocks | plain).items() if path in blocks or wanted(path)}
    sums: dict[str, torch.Tensor] = {}
    n_tokens = torch.zeros((), dtype=torch.float64)

    def see(path: str, entering: torch.Tensor, batch: range) -> None:
        tokens = entering.flatten(0, -2)
        found = {path: tokens.double().square().sum(0)}
        if path in blocks:
            found = _of_experts(path, blocks[path], tokens, target)
            if path == next(iter(blocks)):
                n_tokens.add_(len(tokens))
        for name, own in found.items():
            sums[name] = sums[name] + own if name in sums else own

    _show_inputs(fabric, module, examples, batch_size, watched, see)
    total = sum_over_devices(fabric, n_tokens.to(fabric.device))
    return {name: (sum_over_devices(fabric, own) / total).float().cpu() for name, own in sums.items() if wanted(name)}


def _of_experts(path: str, block: Any, tokens: torch.Tensor, target: Target) -> dict[str, torch.Tensor]:
    """Sums of squares of one mixture's inputs, by the experts' names on the disk; tokens (N, width)."""
    outer = path.rpartition(".")[0] + "." + target.block
    _, shares, places = block.gate(tokens)
    found = {f"{outer}.gate.weight": tokens.double().square().sum(0)}
    experts = block.experts
    for number in range(len(experts.down_proj)):
        rows, slots = torch.where(places == number)
        own, share = tokens[rows], shares[rows, slots, None].double()
        gate, up = nn.functional.linear(own, experts.gate_up_proj[number]).chunk(2, dim=-1)
        entering = (own.double() * share).square().sum(0)
        between = ((experts.act_fn(gate) * up).double() * share).square().sum(0)
        names = {part: f"{outer}.experts.{number}.{name}.weight" for part, name in target.parts.items()}
        found |= {names["gate_proj"]: entering, names["up_proj"]: entering, names["down_proj"]: between}
    return found
