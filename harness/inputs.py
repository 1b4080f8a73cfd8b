"""What a merge is given, and what is refused before any weight is read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from methods.kinds import Base, Kind, Place, Roles, Row
from pools.faults import Spec, header_faults, specs_of

CPU = torch.device("cpu")
Tensors = Mapping[str, torch.Tensor]


class MergeError(ValueError):
    """The inputs cannot be merged; the message names the tensor, its shape and the expert."""


@dataclass(frozen=True)
class Inputs:
    """What is merged: lazily read tensors by name, and what their names mean."""

    base: Tensors | None
    experts: Mapping[str, Tensors]
    roles: Roles
    stats: Mapping[str, Tensors] | None = None  # expert -> tensor name -> statistic
    seed: int = 0
    device: torch.device = CPU
    dtype: torch.dtype | None = None  # of the merged floating tensors; None: the base's
    held: Any = None  # `harness.held.Held`: the weights on the device, where many merges are done

    @functools.cached_property
    def specs(self) -> dict[str, Spec]:
        """Names, shapes and dtypes of the merged model: the base's, or without one the first expert's."""
        return specs_of(self.base if self.base is not None else next(iter(self.experts.values())))

    def is_weight(self, name: str) -> bool:
        """Whether a tensor is merged by the method; buffers and what is empty go their own way."""
        spec = self.specs[name]
        return spec.dtype.is_floating_point and 0 not in spec.shape and not self.roles.is_buffer(name)

    def place(self, name: str) -> Place:
        """Where a tensor stands."""
        roles = self.roles
        return Place(roles.layer_of(name), roles.n_layers, roles.is_linear(name), name, roles.is_transposed(name))

    def stats_of(self, name: str) -> torch.Tensor | None:
        """Statistics of all experts for a tensor, (T, ...) float32; found by its name or its module's."""
        if self.stats is None:
            return None
        found = [stats.get(name, stats.get(name.removesuffix(".weight"))) for stats in self.stats.values()]
        known = {expert: stat for expert, stat in zip(self.stats, found, strict=True) if stat is not None}
        if not known:
            return None
        if len(known) < len(found):
            missing = ", ".join(expert for expert in self.stats if expert not in known)
            raise MergeError(f"{name}: statistics are missing for {missing}, and present for the others")
        broken = [expert for expert, stat in known.items() if not torch.isfinite(stat).all()]
        if broken:
            raise MergeError(f"{name}: statistics are NaN or infinite for {', '.join(broken)}")
        if len({stat.shape for stat in known.values()}) > 1:
            shapes = ", ".join(f"{expert} {tuple(stat.shape)}" for expert, stat in known.items())
            raise MergeError(f"{name}: statistics differ in shape: {shapes}")
        return torch.stack([stat.to(self.device, torch.float32) for stat in known.values()])


def check(row: Row, inputs: Inputs) -> None:
    """Refuse inputs that the method cannot merge, before any weight is read.

    Raises:
        MergeError: All that is wrong, a line each.
    """
    low, high = row.n_experts
    n_experts = len(inputs.experts)
    faults = []
    if row.kind in (Kind.search, Kind.build):
        faults.append(f"{row.name} needs models and data, not only tensors: run it as `crucible run method={row.name}`")
    if n_experts < low or (high is not None and n_experts > high):
        wanted = f"{low}" if high == low else f"at least {low}" if high is None else f"{low} to {high}"
        faults.append(f"{row.name} merges {wanted} experts, got {n_experts}: {', '.join(inputs.experts) or 'none'}")
    if row.base is Base.needed and inputs.base is None:
        faults.append(f"{row.name} needs a base model, and there is none")
    faults += _stats_faults(row, inputs) + header_faults(inputs.base, inputs.experts)
    if faults:
        raise MergeError("\n".join(faults))


def _stats_faults(row: Row, inputs: Inputs) -> list[str]:
    """Statistics that are missing, not asked for, of other experts or of other tensors."""
    if inputs.stats is None:
        return [f"{row.name} needs `stats`: for each expert, {row.stats} by tensor name"] if row.stats else []
    if not row.stats:
        return [f"{row.name} takes no `stats`; leave them out"]
    if set(inputs.stats) != set(inputs.experts):
        return [f"statistics are given for {', '.join(inputs.stats)}; experts are {', '.join(inputs.experts)}"]
    known = {name for tensors in inputs.experts.values() for name in tensors}
    known |= {name.removesuffix(".weight") for name in known}
    return [
        f"none of expert {expert}'s statistics has the name of a tensor or its module, the first is {next(iter(names))}"
        for expert, names in inputs.stats.items()
        if names and known.isdisjoint(names)
    ]
