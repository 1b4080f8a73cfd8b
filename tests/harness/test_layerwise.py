"""Merges block by block: what a block is fed has come through the merged blocks before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from harness.bench import open_bench
from harness.compose import compose
from harness.execute import launch
from harness.inputs import Inputs, MergeError
from harness.layerwise import merged_by_layers
from harness.make import Job, make
from harness.merge import Merge, merge, merge_state_dicts
from harness.track import local_path
from harness.trials import Resident
from harness.veneers import Worn
from methods.catalogue import VENEERS, find
from pools.roles import ModuleRoles


class Stack(nn.Module):
    """Tokens (N, 4) through an embedding, two blocks of two layers and an end."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(4))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("steps", torch.tensor(seed))

    def block(self, index: int, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + self.blocks[index](tokens)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.block(1, self.block(0, tokens + self.embedding))))


EXPERTS = {name: Stack(seed) for name, seed in (("a", 1), ("b", 2))}
OTHERS = ("regmean_plusplus", "trust_region", "cat_merging_informed")
TOKENS = {name: torch.randn(30, 4, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(EXPERTS)}
STATES = {name: expert.state_dict() for name, expert in EXPERTS.items()}


def grams_of(module: nn.Module, tokens: torch.Tensor, is_linear) -> dict[str, torch.Tensor]:
    found, handles = {}, []
    for path, layer in module.named_modules():
        if is_linear(f"{path}.weight"):

            def hook(layer, args, name=f"{path}.weight"):
                found[name] = (args[0].T @ args[0] / len(args[0])).detach()

            handles.append(layer.register_forward_pre_hook(hook))
    module(tokens)
    for handle in handles:
        handle.remove()
    return found


def job(method: str = "regmean_plusplus", dtype: torch.dtype = torch.float32, **params) -> Merge:
    row, roles = find(method), ModuleRoles(Stack(0))
    states = {
        name: {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        for name, state in STATES.items()
    }
    return Merge(row, row.load_params()(**params), Inputs(states["a"], states, roles))


def by_layers(asked: Merge) -> dict[str, torch.Tensor]:
    module = Stack(0)
    return merge(merged_by_layers(asked, module, lambda expert, is_linear: grams_of(module, TOKENS[expert], is_linear)))


def test_each_block_is_fed_what_the_merged_ones_before_make() -> None:
    """Block after block by hand, each with `regmean`: an expert's own block behind merged ones."""
    merged = Stack(0)
    roles = ModuleRoles(merged)
    for start in ("embedding", "blocks.0.", "blocks.1.", ("norm.", "head.")):
        stats = {}
        for name in EXPERTS:
            mixed = Stack(0)
            own = {key: tensor for key, tensor in STATES[name].items() if key.startswith(start)}
            mixed.load_state_dict(merged.state_dict() | own)
            stats[name] = grams_of(mixed, TOKENS[name], lambda key, own=own: key in own and roles.is_linear(key))
        part = {name: {key: state[key] for key in state if key.startswith(start)} for name, state in STATES.items()}
        done = merge_state_dicts(None, part, "regmean", {"off_diagonal": 0.95}, stats, roles=roles)
        merged.load_state_dict(merged.state_dict() | done)
    ours = by_layers(job())
    for key, tensor in merged.named_parameters():
        torch.testing.assert_close(ours[key], tensor.detach(), rtol=1e-4, atol=1e-5, msg=key)


def test_regmean_comes_to_something_else_in_every_block_but_not_before() -> None:
    stats = {name: grams_of(expert, TOKENS[name], ModuleRoles(expert).is_linear) for name, expert in EXPERTS.items()}
    ours, asked = by_layers(job()), job("regmean", off_diagonal=0.95)
    plain = merge(replace(asked, inputs=replace(asked.inputs, stats=stats)))
    assert list(ours) == list(plain)
    assert ours["steps"] == 1  # an integer buffer is the base's
    assert torch.equal(ours["embedding"], plain["embedding"])  # averaged
    different = {key for key in ours if not torch.allclose(ours[key], plain[key], atol=1e-3)}
    assert different == {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in (0, 2)} | {"head.weight"}


def test_it_is_rounded_once_to_the_dtype_of_the_base() -> None:
    ours = by_layers(job(dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in ours.values() if tensor.is_floating_point()} == {torch.bfloat16}


def test_the_parameters_are_the_methods_own() -> None:
    module = Stack(0)
    asked = job(off_diagonal=0.5)
    done = merged_by_layers(asked, module, lambda expert, is_linear: grams_of(module, TOKENS[expert], is_linear))
    assert done.row.name == "regmean_plusplus"
    assert done.of("head.weight").off_diagonal == 0.5
    assert not torch.equal(merge(done)["head.weight"], by_layers(job())["head.weight"])


def test_a_veneer_that_looks_at_the_whole_model_is_refused() -> None:
    veneer = VENEERS["larv"]
    asked = Merge(job().row, job().params, job().inputs, veneers=(Worn(veneer, veneer.load_params()()),))
    with pytest.raises(MergeError, match="regmean_plusplus merges block by block; larv looks at the whole model first"):
        by_layers(asked)


@pytest.mark.parametrize("method", ["ada_svd", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_with_a_pool_and_tasks(workplace, method) -> None:
    """Every expert is fed its own task's rows; weights move and stay finite."""
    config = compose([*workplace.choices, f"method={method}", "adaptation.batch_size=5"])
    bench = open_bench(config.pool, config.tasks, local_path)
    made = make(Job(find(method), config.method, bench, launch("cpu", 1, "32-true", 0), config.adaptation, 0))
    merged = merge(made.merge)
    assert list(merged) == list(bench.pool.base)
    moved = [name for name in merged if not torch.equal(merged[name], bench.pool.base[name])]
    assert len(moved) > 0.9 * len(merged) - 2
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())


@pytest.mark.slow
def test_trials_collect_anew_what_depends_on_parameters(workplace) -> None:
    """One resident, two settings: the second is what a fresh run comes to."""
    told = [*workplace.choices, "method=regmean_plusplus", "evaluation.split=validation"]
    first, second = (compose([*told, f"method.off_diagonal={value}"]) for value in (0.2, 0.9))
    resident = Resident(first)
    before, after = ([step.metrics for step in resident.score(config, 0)][-1] for config in (first, second))
    fresh = [step.metrics for step in Resident(second).score(second, 0)][-1]
    losses = [name for name in fresh if name.endswith("/loss")]
    assert {name: after[name] for name in losses} == {name: fresh[name] for name in losses}
    assert any(before[name] != after[name] for name in losses)
