"""Small checkpoints with a tensor of every sort, and what each catalogue row needs to merge them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from harness.merge import merge_state_dicts
from harness.veneers import Worn, veneered
from methods.catalogue import CATALOGUE, VENEERS
from methods.kinds import Kind, Row

N_SCALARS = 8
SHAPES: dict[str, tuple[int, ...]] = {
    "embeddings.class_embedding": (8,),
    "embeddings.patch_embedding.weight": (4, 3, 2, 2),  # a convolution
    "embeddings.position_embedding.weight": (5, 8),
    "layers.0.q_proj.weight": (8, 8),
    "layers.0.q_proj.bias": (8,),
    "layers.0.fc1.weight": (12, 8),
    "layers.0.fc2.weight": (8, 12),
    "layers.1.fc1.weight": (1, 8),  # one row
    "layers.1.fc2.weight": (8, 1),  # one column
    "layers.1.empty_proj.weight": (0, 8),
    "layers.1.nothing": (0,),
    "single": (1,),
    "batch_norm.running_mean": (8,),
    **{f"scalar_{index}": () for index in range(N_SCALARS)},
}
BUFFERS = ("batch_norm.running_mean", "batch_norm.num_batches_tracked", "embeddings.position_ids")
EXPERTS = ("ant", "bee", "cat")

State = dict[str, Tensor]


class SampleRoles:
    """What the sample's names mean."""

    n_layers = 2

    def is_buffer(self, name: str) -> bool:
        return name in BUFFERS

    def is_linear(self, name: str) -> bool:
        return name.endswith(".weight") and name.split(".")[-2].rpartition("_")[2] in ("proj", "fc1", "fc2")

    def is_transposed(self, name: str) -> bool:
        return False

    def layer_of(self, name: str) -> int:
        parts = name.split(".")
        return int(parts[1]) + 1 if parts[0] == "layers" else 0

    def mlps(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Case:
    """A row with parameters; the contract holds for each."""

    row: Row
    params: dict[str, Any] = field(default_factory=dict)
    veneers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        name = "+".join([self.row.name, *self.veneers])
        return "-".join([name, *(f"{key}={value}" for key, value in self.params.items())])

    @property
    def n_experts(self) -> int:
        high = self.row.n_experts[1]
        return len(EXPERTS) if high is None else min(high, len(EXPERTS))

    @property
    def ordered(self) -> bool:
        return self.row.ordered or any(isinstance(value, list) for value in self.params.values())

    @property
    def reads_experts(self) -> bool:
        return self.row.n_experts[0] > 0


# Parameter values, besides the defaults, for which the whole contract is run.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "expert": ({"expert": "bee"},),
    "weighted_average": ({"weights": [1.0, 2.0, 0.5]},),
    "task_arithmetic": ({"scale": 1.0}, {"weights": [0.5, -0.2, 1.0]}),
    "ties": (
        {"scope": "tensor"},
        {"disjoint": "sum"},
        {"disjoint": "max"},
        {"density": 1.0},
        {"elect": "count", "rescale": "l1"},
        {"weights": [0.5, 2.0, 1.0], "densities": [0.4, 0.2, 1.0], "scope": "tensor", "rescale": "l1"},
    ),
    "dare": (
        {"base_rule": "ties"},
        {"base_rule": "ties", "scope": "tensor"},
        {"density": 1.0},
        {"rescale": "none"},
        {"rescale": "l1", "scope": "tensor"},
        {"weights": [0.5, 2.0, 1.0], "densities": [0.4, 0.9, 1.0]},
    ),
    "della": ({"rescale": "l1", "weights": [0.5, 2.0, 1.0], "densities": [0.4, 0.8, 1.0]},),
    "breadcrumbs": ({"density": 0.97, "gamma": 0.05, "weights": [0.5, 2.0, 1.0]},),
    "consensus_ta": ({"agree": 3, "selectivities": [0.1, 0.05, 0.1]},),
    "pcb": ({"scope": "tensor", "weights": [0.5, 2.0, 1.0]},),
    "cabs": ({"n": 1, "m": 3, "weights": [0.5, 2.0, 1.0]},),
    "sce": ({"density": 1.0},),
    "ramplus_tl": ({"scope": "model", "epsilon": 0.05, "alpha": 1.0},),
    "magnitude_prune": (
        {"density": 0.2, "rescale": "share", "weights": [0.5, 2.0, 1.0]},
        {"scope": "tensor", "prune": "major", "rescale": "l1"},
    ),
    "nan": ({"scope": "model"},),
    "metagpt": ({"scope": "tensor"},),
    "model_stock": ({"filter_wise": True},),
    "prune_random": ({"scope": "model"}, {"n": 2, "m": 3}),
    "prune_magnitude": ({"scope": "tensor", "density": 0.2}, {"scope": "model", "matrices": "all"}),
    "wanda": ({"n": 1, "m": 3},),
    "sparse_gpt": ({"n": 2}, {"scope": "row", "block": 3}),
    "slerp": ({"t": 0.2}, {"weights": [1.0, 2.0, 0.5]}),
    "nuslerp": ({"along": "last"}, {"along": "first", "weights": [0.4, 0.6]}),
    "karcher": ({"weights": [1.0, 2.0, 0.5]},),
    "fisher": ({"normalize": False}, {"weights": [1.0, 0.0, 2.0]}),
    "regmean": ({"off_diagonal": 0.0}, {"off_diagonal": 1.0}),
    "trust_region": ({"scope": "tensor", "density": 0.8},),
    "trust_region_zero_shot": ({"scope": "tensor"},),
    "cat_merging": ({"rank": 1, "preserve": 0.0},),
    "opcm": ({"alpha": 0.0}, {"alpha": 0.9}),
    "dop": ({"mgda": False, "space": "u"}, {"ema": 0.0, "svd_epsilon": 0.5, "space": "v"}),
    "continual_ties": ({"disjoint": "sum"},),
    "wudi": ({"matrices": "conv"},),
    "doge_ta": ({"density": 1.0},),
    "ace": ({"threshold": 0.0},),
    "awd": ({"scope": "tensor"},),
    "iso_c": ({"matrices": "conv"},),
    "iso_cts": ({"common_space_fraction": 0.0},),
    "tsv_m": ({"weights": [0.5, 2.0, 1.0], "matrices": "conv"},),
    "singular_projection": ({"part": "high", "null_space": False, "matrices": "all"},),
}
_TENSORS = (Kind.rule, Kind.informed, Kind.fold)
# Names and shapes stay.
SERVED = [row for row in CATALOGUE.values() if row.kind in _TENSORS and not row.ranges and not row.mixture]
FEW = {"steps": 12}  # of what a rule iterates, in the place of hundreds: the contract is the same, the wait is not


def few(row: Row) -> dict[str, Any]:
    """What makes a row quick, and fit for models that are no mixtures."""
    known = {each.name: each.default for each in fields(row.load_params())}
    blocks = {"matrices": "blocks"} if known.get("matrices") == "experts" else {}
    return (FEW if "steps" in known else {}) | blocks


CASES = [Case(row, {**few(row), **params}) for row in SERVED for params in ({}, *VARIANTS.get(row.name, ()))]


def _dressed(name: str, *around: str, **params: Any) -> Case:
    """A row with veneers."""
    worn = [Worn(VENEERS[veneer], VENEERS[veneer].load_params()()) for veneer in around]
    return Case(veneered(CATALOGUE[name], worn), params, {veneer: {} for veneer in around})


CASES += [
    _dressed("task_arithmetic", "lines"),
    _dressed("ties", "larv"),
    _dressed("ties", "knots", scope="tensor"),
    _dressed("dare", "knots"),
    _dressed("simple_average", "svc"),
    _dressed("ties", "lines", "svc", "knots"),
]


def models(
    n_experts: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
) -> tuple[State, dict[str, State]]:
    """A base and experts: noise around it, some entries untouched; scalars move far, so that no trimming drops them."""
    generator = torch.Generator().manual_seed(seed)

    def changed(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor + 1 + torch.rand((), generator=generator)
        noise = 0.1 * torch.randn(tensor.shape, generator=generator)
        return tensor + noise * (torch.rand(tensor.shape, generator=generator) > 0.1)

    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {name: {key: changed(tensor) for key, tensor in base.items()} for name in EXPERTS[:n_experts]}
    for index, state in enumerate([base, *experts.values()]):
        for name in state:
            state[name] = state[name].to(dtype)
        if shapes is SHAPES:
            state["batch_norm.num_batches_tracked"] = torch.tensor(100 + index)
            state["embeddings.position_ids"] = torch.arange(5)[None]
    return base, experts


def _fisher(state: State, generator: torch.Generator) -> State:
    """Non-negative values with exact zeros."""
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    return {name: torch.randn(t.shape, generator=generator).clamp(min=0).square() for name, t in floats.items()}


def _gram(state: State, generator: torch.Generator) -> State:
    """X^T X / n of fewer inputs than the widest layer has columns, and one input that is never active."""
    grams = {}
    for name, tensor in state.items():
        if SampleRoles().is_linear(name) and tensor.dim() == 2:
            inputs = torch.randn((10, tensor.shape[1]), generator=generator)
            inputs[:, :1] = 0
            grams[name] = inputs.T @ inputs / 10
    return grams


def _gradient(state: State, generator: torch.Generator) -> State:
    """Magnitudes of gradients, with exact zeros; scalars, which move far, matter little to any loss."""
    found = _fisher(state, generator)
    return {name: 1e-3 * tensor if tensor.dim() == 0 else tensor for name, tensor in found.items()}


def _inputs(state: State, generator: torch.Generator) -> State:
    """Ten inputs of each linear layer."""
    return {
        name: torch.randn((10, tensor.shape[1]), generator=generator)
        for name, tensor in state.items()
        if SampleRoles().is_linear(name) and tensor.dim() == 2
    }


def _features(state: State, generator: torch.Generator) -> State:
    """Gram matrices, and mean squares of what the one scale scales."""
    found = _gram(state, generator)
    scale = "embeddings.class_embedding"
    return found | ({scale: torch.rand(state[scale].shape, generator=generator)} if scale in state else {})


def _routed(state: State, generator: torch.Generator) -> State:
    """Mean squares of each input."""
    return {name: gram.diagonal().clone() for name, gram in _gram(state, generator).items()}


STATS = {  # by what a row asks for in `stats`
    "fisher": _fisher,
    "gram": _gram,
    "gradient": _gradient,
    "inputs": _inputs,
    "features": _features,
    "routed": _routed,
}


def stats_for(row: Row, experts: dict[str, State], seed: int = 0) -> dict[str, State] | None:
    """Synthetic statistics, where the row needs them."""
    if not row.stats:
        return None
    seeds = {name: seed + 1 + EXPERTS.index(name) for name in experts}
    return {
        name: STATS[row.stats](state, torch.Generator().manual_seed(seeds[name])) for name, state in experts.items()
    }


def merge_case(case: Case, base: State | None, experts: dict[str, State], **given: Any) -> State:
    """Merge as a user would, with synthetic statistics."""
    given.setdefault("stats", stats_for(case.row, experts))
    given.setdefault("roles", SampleRoles())
    return merge_state_dicts(base, experts, case.row.name, case.params, veneers=case.veneers, **given)


def digests() -> dict[str, str]:
    """The bits of every case's result."""
    found = {}
    for case in CASES:
        base, experts = models(case.n_experts)
        merged = merge_case(case, base, experts, seed=7)
        pieces = [name.encode() + tensor.numpy().tobytes() for name, tensor in merged.items()]
        found[str(case)] = hashlib.sha256(b"".join(pieces)).hexdigest()
    return found
