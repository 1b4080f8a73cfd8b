"""The contract of a merge, run against every catalogue row that merges tensors, and variants of its parameters."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import harness.pieces
from methods.kinds import Base, resolve
from tests.methods.samples import BUFFERS, CASES, EXPERTS, SHAPES, Case, State, digests, merge_case, models, stats_for

ROOT = Path(__file__).parents[2]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def which(condition) -> pytest.MarkDecorator:
    """The cases whose row meets a condition."""
    return pytest.mark.parametrize("case", [case for case in CASES if condition(case)], ids=str)


def assert_close(merged: State, expected: State, atol: float = 1e-6, rtol: float = 1e-5) -> None:
    assert list(merged) == list(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=atol, rtol=rtol, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_same_bits(merged: State, expected: State) -> None:
    assert list(merged) == list(expected)
    for name, tensor in merged.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@every_case
def test_copies_of_the_base_merge_to_the_base(case: Case) -> None:
    """Where the method prunes, with everything kept."""
    base, _ = models()
    if case.row.prunes:
        case = dataclasses.replace(case, params={**case.params, "density": 1.0, "n": 0})
    copies = {name: {key: tensor.clone() for key, tensor in base.items()} for name in EXPERTS[: case.n_experts]}
    assert_close(merge_case(case, base, copies), base)


@every_case
def test_names_shapes_and_dtypes_are_kept(case: Case) -> None:
    base, experts = models(case.n_experts)
    merged = merge_case(case, base, experts)
    assert list(merged) == list(base)
    for name, tensor in merged.items():
        assert tensor.shape == base[name].shape, name
        assert tensor.dtype == base[name].dtype, name
        assert torch.isfinite(tensor).all(), name
        assert not tensor.requires_grad, name


@every_case
def test_inputs_are_untouched_and_not_shared(case: Case) -> None:
    base, experts = models(case.n_experts)
    before = copy.deepcopy((base, experts))
    merged = merge_case(case, base, experts)
    for tensor in merged.values():
        tensor.fill_(123)
    assert_same_bits(base, before[0])
    for name, expert in experts.items():
        assert_same_bits(expert, before[1][name])


@which(lambda case: case.reads_experts)
def test_every_sort_of_tensor_moves(case: Case) -> None:
    """Scalars move all, or where entries are dropped at random or tensors may rest some; so does each other tensor."""
    base, experts = models(case.n_experts)
    merged = merge_case(case, base, experts)
    moved = {name for name in SHAPES if not torch.equal(merged[name], base[name])}
    scalars = {name for name, shape in SHAPES.items() if shape == ()}
    assert scalars & moved if case.row.random or case.row.may_rest else scalars <= moved
    large = {"embeddings.patch_embedding.weight", "layers.0.fc1.weight", "layers.1.fc1.weight"}
    assert large & moved if case.row.may_rest else large <= moved


@which(lambda case: not case.ordered)
def test_order_of_experts_is_irrelevant(case: Case) -> None:
    base, experts = models(case.n_experts)
    turned = dict(reversed(experts.items()))
    assert_close(merge_case(case, base, turned), merge_case(case, base, experts))


@every_case
def test_order_of_tensors_is_irrelevant(case: Case) -> None:
    base, experts = models(case.n_experts)
    stats = stats_for(case.row, experts)
    merged = merge_case(case, base, experts, stats=stats)
    turned = {name: dict(reversed(expert.items())) for name, expert in experts.items()}
    assert_same_bits(merge_case(case, base, turned, stats=stats), merged)
    again = merge_case(case, dict(reversed(base.items())), turned, stats=stats)
    assert_close(dict(reversed(again.items())), merged, atol=1e-7, rtol=1e-6)


def test_same_seed_same_bits_in_another_process() -> None:
    """One process for all rows, with another hash seed."""
    environment = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = "import json; from tests.methods.samples import digests; print(json.dumps(digests()))"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    there = json.loads(done.stdout)
    assert there == digests()
    assert len(there) == len(CASES)


@which(lambda case: case.row.random and case.params.get("density") != 1)
def test_another_seed_gives_other_bits(case: Case) -> None:
    base, experts = models(case.n_experts)
    one, other = (merge_case(case, base, experts, seed=seed) for seed in (1, 2))
    assert any(not torch.equal(one[name], other[name]) for name in one)


@which(lambda case: not case.row.random)
def test_the_seed_is_irrelevant_where_nothing_is_drawn(case: Case) -> None:
    base, experts = models(case.n_experts)
    assert_same_bits(merge_case(case, base, experts, seed=1), merge_case(case, base, experts, seed=2))


@every_case
def test_bfloat16_in_bfloat16_out(case: Case) -> None:
    """Arithmetic runs in float32 and is rounded once, so the result is the rounded float32 result to the bit."""
    base, experts = models(case.n_experts, dtype=torch.bfloat16)

    def in_float32(state: State) -> State:
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}

    merged = merge_case(case, base, experts)
    exact = merge_case(case, in_float32(base), {name: in_float32(expert) for name, expert in experts.items()})
    assert merged["single"].dtype == torch.bfloat16
    assert_same_bits(merged, {name: tensor.to(base[name].dtype) for name, tensor in exact.items()})


@pytest.mark.parametrize("chunk", [16, 48])
@every_case
def test_chunked_equals_whole(case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = models(case.n_experts)
    whole = merge_case(case, base, experts)
    monkeypatch.setattr(harness.pieces, "CHUNK", chunk)
    assert_same_bits(merge_case(case, base, experts), whole)


@every_case
def test_number_of_threads_is_irrelevant(case: Case) -> None:
    """On tensors large enough for torch to share out."""
    shapes = {"layers.0.fc1.weight": (48, 40), "embedding": (300, 257), "bias": (48,)}
    base, experts = models(case.n_experts, shapes=shapes)
    before = torch.get_num_threads()
    try:
        results = []
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            results.append(merge_case(case, base, experts))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*results)


@which(
    lambda case: (
        case.row.base is Base.needed and "scale" in {field.name for field in dataclasses.fields(case.row.load_params())}
    )
)
def test_scale_zero_gives_the_base(case: Case) -> None:
    base, experts = models(case.n_experts)
    merged = merge_case(Case(case.row, {**case.params, "scale": 0.0}, case.veneers), base, experts)
    weights = [name for name in base if name not in BUFFERS]
    assert_same_bits({name: merged[name] for name in weights}, {name: base[name] for name in weights})


@every_case
def test_integer_buffers_are_the_bases_and_floating_ones_averaged(case: Case) -> None:
    base, experts = models(case.n_experts)
    merged = merge_case(case, base, experts)
    assert merged["batch_norm.num_batches_tracked"] == 100
    assert torch.equal(merged["embeddings.position_ids"], base["embeddings.position_ids"])
    read = tuple(experts)
    if case.row.members:
        read = resolve(case.row.members)(case.row.load_params()(**case.params), read)
    running = [experts[name]["batch_norm.running_mean"] for name in read] or [base["batch_norm.running_mean"]]
    torch.testing.assert_close(merged["batch_norm.running_mean"], torch.stack(running).mean(0))


@which(lambda case: case.row.base in (Base.optional, Base.unused))
def test_without_a_base(case: Case) -> None:
    """What does without a base gives the same weights with one."""
    base, experts = models(case.n_experts)
    for state in experts.values():
        state["batch_norm.num_batches_tracked"] = base["batch_norm.num_batches_tracked"]
    assert_same_bits(merge_case(case, None, experts), merge_case(case, base, experts))


@every_case
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_any_shapes(case: Case, shapes: list[tuple[int, ...]], seed: int) -> None:
    """Whatever the shapes: they are kept, every number is finite, and no weight leaves the region of the models."""
    named = {
        f"layers.{index}.fc1.{'weight' if len(shape) == 2 else 'bias'}": shape for index, shape in enumerate(shapes)
    }
    if case.row.prunes:
        named["layers.0.q_proj.weight"] = (4, 3)  # something to prune
    base, experts = models(case.n_experts, seed, shapes=named)
    merged = merge_case(case, base, experts)
    tensors = [tensor for state in [base, *experts.values()] for tensor in state.values()]
    largest = max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0)
    for name, tensor in merged.items():
        assert tensor.shape == base[name].shape
        assert torch.isfinite(tensor).all()
        assert tensor.numel() == 0 or float(tensor.abs().max()) <= 12 * largest
