"""The engine: what every method gets from it, and when it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

import harness.pieces
from harness.inputs import Inputs, MergeError
from harness.merge import Merge, merge, merge_state_dicts, ready
from methods.catalogue import find
from pools.faults import specs_of
from pools.roles import NamedRoles

State = dict[str, torch.Tensor]


def models(n_experts: int = 2) -> tuple[State, dict[str, State]]:
    base = {"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)}
    experts = {f"e{i}": {name: tensor + i + 1 for name, tensor in base.items()} for i in range(n_experts)}
    return base, experts


def inputs_of(base: Mapping, experts: Mapping) -> Inputs:
    return Inputs(base, experts, NamedRoles(specs_of(base)))


class Lazy(Mapping[str, torch.Tensor]):
    """A checkpoint whose header is known; counts what is read."""

    def __init__(self, tensors: State) -> None:
        self._tensors, self.seen = tensors, []
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        self.seen.append(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_the_bases_whatever_the_experts(dtype: torch.dtype) -> None:
    base, experts = models()
    base = {name: tensor.to(dtype) for name, tensor in base.items()}
    merged = merge_state_dicts(base, experts, "task_arithmetic", {"scale": 1.0})
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    assert merged["fc.bias"].tolist() == [3.0, 3.0]


def test_arithmetic_runs_in_float32() -> None:
    """In bfloat16 1 + 1/256 is 1, and the sum of a hundred of them 100."""
    base = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    experts = {f"e{i}": {"w": torch.tensor([1 / 256 if i else 1.0], dtype=torch.bfloat16)} for i in range(129)}
    merged = merge_state_dicts(base, experts, "task_arithmetic", {"scale": 1.0})
    assert merged["w"].item() == 1.5


def test_parameters_of_a_module_are_merged_without_a_graph() -> None:
    layer = torch.nn.Linear(3, 2)
    merged = merge_state_dicts(dict(layer.named_parameters()), {"a": dict(layer.named_parameters())}, "ties")
    assert not any(tensor.requires_grad for tensor in merged.values())


def test_tensors_that_are_not_contiguous() -> None:
    base = {"w": torch.arange(6.0).reshape(2, 3).T}
    experts = {"a": {"w": (torch.arange(6.0).reshape(3, 2))}}
    merged = merge_state_dicts(base, experts, "simple_average")["w"]
    assert torch.equal(merged, experts["a"]["w"])
    assert torch.equal(merge_state_dicts(base, experts, "base")["w"], base["w"])


def test_integer_buffers_without_a_base_must_agree() -> None:
    experts = {name: {"w": torch.ones(1), "bn.num_batches_tracked": torch.tensor(3)} for name in ("a", "b")}
    assert merge_state_dicts(None, experts, "simple_average")["bn.num_batches_tracked"] == 3
    experts["b"]["bn.num_batches_tracked"] = torch.tensor(4)
    with pytest.raises(MergeError, match=r"bn.num_batches_tracked is an integer buffer that differs between experts"):
        merge_state_dicts(None, experts, "simple_average")


def test_a_model_of_buffers_only() -> None:
    base = {"bn.running_mean": torch.zeros(2), "position_ids": torch.arange(3)}
    experts = {name: {"bn.running_mean": torch.ones(2), "position_ids": torch.arange(3)} for name in "ab"}
    for method in ("ties", "dare", "opcm"):
        merged = merge_state_dicts(base, experts, method)
        assert merged["bn.running_mean"].tolist() == [1.0, 1.0]
        assert merged["position_ids"].tolist() == [0, 1, 2]


def test_only_a_chunk_of_a_tensor_reaches_an_elementwise_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    row = find("task_arithmetic")
    rule = row.load()

    def watched(base, experts, params):
        seen.append(tuple(experts.shape))
        return rule(base, experts, params)

    monkeypatch.setattr("methods.task_arithmetic.task_arithmetic", watched)
    monkeypatch.setattr(harness.pieces, "CHUNK", 16)
    base, experts = {"w": torch.zeros(5, 8)}, {"a": {"w": torch.ones(5, 8)}}
    merged = merge_state_dicts(base, experts, "task_arithmetic", {"scale": 0.5})
    assert seen[-3:] == [(1, 16), (1, 16), (1, 8)]
    assert torch.equal(merged["w"], torch.full((5, 8), 0.5))


def test_checks_come_before_any_weight_is_read_and_tensors_one_by_one() -> None:
    base, experts = models()
    lazy = {name: Lazy(tensors) for name, tensors in experts.items()}
    job = ready(Merge(find("task_arithmetic"), find("task_arithmetic").load_params()(), inputs_of(Lazy(base), lazy)))
    assert all(tensors.seen == [] for tensors in lazy.values())
    merge(job)
    assert all(tensors.seen == ["fc.weight", "fc.bias"] for tensors in lazy.values())


def test_only_members_are_read() -> None:
    _, experts = models(3)
    lazy = {name: Lazy(tensors) for name, tensors in experts.items()}
    merge_state_dicts(None, lazy, "expert", {"expert": "e1"})
    assert lazy["e1"].seen
    assert lazy["e0"].seen == lazy["e2"].seen == []


def test_parameters_of_each_tensor() -> None:
    """As a search hands over the coefficients that it found."""
    base, experts = models()
    row = find("task_arithmetic")
    params = row.load_params()(scale=1.0)

    def own(name: str) -> Any:
        return dataclasses.replace(params, weights=[1.0, 0.0] if name == "fc.bias" else [0.0, 1.0])

    merged = merge(Merge(row, params, inputs_of(base, experts), own))
    assert merged["fc.bias"].tolist() == [1.0, 1.0]
    assert merged["fc.weight"].tolist() == [[2.0] * 3] * 2


def test_roles_that_are_given_rule() -> None:
    """A name that is taken for a weight by default may be a buffer of the pool's."""

    class AllBuffers(NamedRoles):
        def is_buffer(self, name: str) -> bool:
            return True

    base, experts = models()
    merged = merge_state_dicts(base, experts, "task_arithmetic", {"scale": 0.0}, roles=AllBuffers(specs_of(base)))
    assert merged["fc.bias"].tolist() == [1.5, 1.5]


def test_a_weight_too_many_fails_before_any_weight_is_read() -> None:
    base, experts = models()
    lazy = {name: Lazy(tensors) for name, tensors in experts.items()}
    for method in ("task_arithmetic", "weighted_average", "fisher"):
        stats = {name: {key: torch.ones_like(tensor) for key, tensor in base.items()} for name in experts}
        with pytest.raises(MergeError, match="weights lists 3 numbers for 2 experts"):
            merge_state_dicts(base, lazy, method, {"weights": [1.0] * 3}, stats if method == "fisher" else None)
    assert all(tensors.seen == [] for tensors in lazy.values())
