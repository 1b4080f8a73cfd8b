"""Dense language models as one mixture: feed-forward blocks of several models side by side, a router for each layer.

The mixture's tensors are sources made of the models' own: nothing but the routers is made here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pools.chosen import Members, Parts
from pools.faults import header_faults, specs_of
from pools.headers import CheckpointError
from pools.moe_targets import TARGETS, Target
from pools.picked import Picked, Tensors, name_of

DEFAULTS: dict[str, Any] = {"experts": (), "rest": "base", "top_k": 2, "std": 0.02, "seed": 0, "routers": None}

_BLOCK = re.compile(r"^((?:model\.)?layers\.\d+)\.mlp\.(gate_proj|down_proj|up_proj)\.weight$")
_LAYER = re.compile(r"^((?:model\.)?layers\.\d+)\.")
_SHOWN = 5


class Routers(Picked):
    """Routers in memory, by their names on disk."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep them."""
        self._held = dict(tensors)
        super().__init__({name: (self._held, name) for name in tensors}, "routers")

    @property
    def fingerprint(self) -> str:
        """Hash of their names and values."""
        told = hashlib.sha256()
        for name, tensor in sorted(self._held.items()):
            told.update(name.encode() + tensor.float().numpy().tobytes())
        return told.hexdigest()

    @property
    def stamp(self) -> str:
        """The same: they are small."""
        return self.fingerprint


def mix(
    members: Members, config: Mapping[str, Any], wanted: Mapping[str, Any], gone: Mapping[str | None, list[str]]
) -> tuple[Members, Parts]:
    """Put models side by side.

    Args:
        members: Base and experts, all of one architecture.
        config: The first member's config.json.
        wanted: Keys of `DEFAULTS`: `experts`, a member's name for each expert of the mixture (`base` for the base);
            `rest`, who gives what is no feed-forward block: `base` (without one the first expert) or `mean`, each of
            the experts; `top_k` experts for each token; `std` and `seed` of random routers, or `routers`: path of a
            feed-forward block -> (T, width).
        gone: Member -> names that are in no merged model; those that the mixture has no use for are added.

    Returns:
        The mixture under the name of an expert, one for each giver of the rest, and the routers.

    Raises:
        CheckpointError: All that keeps the models from being a mixture, a line each.
    """
    wanted = DEFAULTS | dict(wanted)
    names = [None if name == "base" and None in members else name for name in wanted["experts"]]
    first = next(iter(members.values()))
    faults = _faults(members, config, wanted, names)
    if faults:
        raise CheckpointError("\n".join(faults))
    target = TARGETS[config["model_type"]]
    blocks = {name: match for name in first if (match := _BLOCK.match(name))}
    experts: Parts = {}
    for name, match in blocks.items():
        for number, member in enumerate(names):
            path = f"{match[1]}.{target.block}.experts.{number}.{target.parts[match[2]]}.weight"
            experts[path] = (members[member], name)
    givers: list[str | None] = list(dict.fromkeys(names)) if wanted["rest"] == "mean" else [next(iter(members))]
    rest = [name for name in first if name not in blocks]
    found: Members = {}
    for giver in givers:
        parts = {name: (members[giver], name) for name in rest} | experts
        found["mixture" if len(givers) == 1 else f"mixture of {giver}"] = Picked(parts, f"a mixture around {giver}")
    for member, own in gone.items():
        unused = blocks if member not in names else {}
        own.extend(name for name in first if name in unused or (name in rest and member not in givers))
    made = Routers(_routers(first, list(blocks), len(names), wanted, target))
    return found, {name: (made, name) for name in made}


def _faults(
    members: Members, config: Mapping[str, Any], wanted: Mapping[str, Any], names: Sequence[str | None]
) -> list[str]:
    """What keeps the models from being a mixture that transformers knows."""
    strange = sorted(wanted.keys() - DEFAULTS.keys())
    faults = [f"pool.mixture has an unknown key {key!r}; known are {', '.join(DEFAULTS)}" for key in strange]
    lacking = [str(name) for name in dict.fromkeys(names) if name not in members]
    faults += [f"pool.mixture names {name}, which the pool lacks" for name in lacking]
    if wanted["rest"] not in ("base", "mean"):
        faults.append(f"pool.mixture: rest is base or mean, got {wanted['rest']!r}")
    if not 1 <= wanted["top_k"] <= len(names):
        faults.append(f"a mixture of {len(names)} experts sends a token to 1 to all of them, got {wanted['top_k']}")
    target = TARGETS.get(str(config.get("model_type")))
    if target is None:
        known = ", ".join(f"{kind} ({one.architecture})" for kind, one in TARGETS.items())
        faults.append(
            f"the models are of the model_type {config.get('model_type')!r}; mixtures are made of such as compute what "
            f"one that transformers knows does around its feed-forward blocks: {known}"
        )
    elif target.block == "mlp" and len(set(config.get("layer_types") or ())) > 1 and not target.shared:
        faults.append(f"its layers attend in different ways (layer_types), and those of a {target.model_type} in one")
    experts = {str(name): one for name, one in members.items() if name is not None}
    if faults or target is None:
        return faults
    return _of_names(next(iter(members.values())), target) or header_faults(members.get(None), experts)


def _of_names(first: Tensors, target: Target) -> list[str]:
    """Modules that a model lacks, and tensors that the mixture has no place for."""
    layers: dict[str, set[str]] = {match[1]: set() for name in first if (match := _LAYER.match(name))}
    for name in first:
        if match := _BLOCK.match(name):
            layers[match[1]].add(match[2])
    short = [path for path, parts in layers.items() if parts != set(target.parts)]
    strange = [name for name in first if not _BLOCK.match(name) and not target.fits(name)]
    faults = [] if layers else [f"{name_of(first)} has no layers (model.layers.N) with feed-forward blocks"]
    if short:
        faults.append(f"{name_of(first)} lacks one of mlp.gate_proj, mlp.up_proj and mlp.down_proj in {_some(short)}")
    if strange:
        faults.append(f"{name_of(first)} has tensors that a {target.architecture} has no place for: {_some(strange)}")
    return faults


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _routers(
    first: Tensors, blocks: Sequence[str], n_experts: int, wanted: Mapping[str, Any], target: Target
) -> dict[str, torch.Tensor]:
    """A router (T, width) for each layer, in the dtype of its feed-forward block; a shared expert adds nothing."""
    specs, given = specs_of(first), wanted["routers"]
    generator = torch.Generator().manual_seed(wanted["seed"])
    found = {}
    for name in blocks:
        path, part = _BLOCK.match(name).groups()  # type: ignore[union-attr]
        if part != "gate_proj":
            continue
        shape = (n_experts, specs[name].shape[1])
        own = torch.randn(shape, generator=generator) * wanted["std"] if given is None else given[f"{path}.mlp"]
        if tuple(own.shape) != shape:
            raise CheckpointError(
                f"the router of {path} is {tuple(own.shape)}, of a mixture of {n_experts} experts it is {shape}"
            )
        found[f"{path}.{target.block}.gate.weight"] = own.to(specs[name].dtype)
        if target.shared:
            row = torch.zeros(1, shape[1], dtype=specs[name].dtype)
            shared = f"{path}.{target.block}.shared_expert"
            found |= {f"{shared}.gate_proj.weight": row, f"{shared}.up_proj.weight": row.clone()}
            found |= {f"{shared}.down_proj.weight": row.clone().mT.contiguous(), f"{shared}_gate.weight": row.clone()}
    return found
