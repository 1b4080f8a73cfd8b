import pytest
import torch

from harness.merge import MergeError, merge_state_dicts
from pools.faults import specs_of
from pools.roles import NamedRoles
from tests.methods.samples import SampleRoles

NAME = "layers.0.fc.weight"
METHODS = ("wanda", "sparse_gpt")


def layer(n_experts: int = 1, seed: int = 0) -> tuple[dict, dict, list[torch.Tensor]]:
    """Experts (5, 8), their Gram matrices and inputs, which are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    experts, grams, inputs = {}, {}, []
    for name in "abc"[:n_experts]:
        mix = torch.randn(8, 8, generator=generator)
        inputs.append(torch.randn(60, 8, generator=generator) @ mix * torch.tensor([1, 2, 4, 0.5, 1, 1, 3, 0.2]))
        experts[name] = {NAME: torch.randn(5, 8, generator=generator)}
        grams[name] = {NAME: inputs[-1].T @ inputs[-1] / 60}
    return experts, grams, inputs


def pruned(experts: dict, grams: dict, method: str = "wanda", **params) -> torch.Tensor:
    return merge_state_dicts(None, experts, method, params, grams)[NAME]


def loss(weight: torch.Tensor, of: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (weight - of).T).square().sum())


def test_by_hand() -> None:
    """A small weight on a large input is worth more: 1 * 4 and 2 * 2.5 beat 3 * 1 and 4 * 0.5."""
    weight, sizes = torch.tensor([[1.0, -2.0, 3.0, -4.0]]), torch.tensor([4.0, 2.5, 1.0, 0.5])
    grams = {"a": {NAME: torch.diag(sizes.square())}}
    assert pruned({"a": {NAME: weight}}, grams).tolist() == [[1, -2, 0, 0]]
    assert pruned({"a": {NAME: weight}}, grams, n=1, m=2).tolist() == [[0, -2, 3, 0]]


def test_only_the_norms_of_inputs_count_and_their_size_does_not() -> None:
    experts, grams, _ = layer()
    found = pruned(experts, grams)
    alone = {"a": {NAME: 7 * torch.diag(grams["a"][NAME].diagonal())}}
    assert torch.equal(pruned(experts, alone), found)
    weight = experts["a"][NAME]
    scores = weight.abs() * grams["a"][NAME].diagonal().sqrt()
    least = scores.sort(dim=1).values[:, 4:5]
    assert torch.equal(found, torch.where(scores >= least, weight, 0.0))


def test_equal_inputs_make_it_magnitude_pruning() -> None:
    experts, _, _ = layer()
    for params in ({}, {"scope": "tensor"}, {"n": 2}):
        plain = merge_state_dicts(None, experts, "prune_magnitude", params)[NAME]
        assert torch.equal(pruned(experts, {"a": {NAME: torch.eye(8)}}, **params), plain)


@pytest.mark.parametrize("method", METHODS)
def test_several_experts(method: str) -> None:
    """Their mean is pruned by the mean of the Gram matrices; one is pruned alone where it is named."""
    experts, grams, _ = layer(3)
    mean = {"a": {NAME: torch.stack([own[NAME] for own in experts.values()]).mean(0)}}
    gram = {"a": {NAME: torch.stack([own[NAME] for own in grams.values()]).mean(0)}}
    torch.testing.assert_close(pruned(experts, grams, method), pruned(mean, gram, method))
    alone = pruned({"b": experts["b"]}, {"b": grams["b"]}, method)
    assert torch.equal(pruned(experts, grams, method, expert="b"), alone)


@pytest.mark.parametrize("method", METHODS)
def test_transposed_layers(method: str) -> None:
    experts, grams, _ = layer()
    name = "h.0.mlp.c_fc.weight"
    state = {name: experts["a"][NAME].T.contiguous()}
    roles = NamedRoles(specs_of(state), transposed=True)
    found = merge_state_dicts(None, {"a": state}, method, {}, {"a": {name: grams["a"][NAME]}}, roles=roles)
    assert torch.equal(found[name], pruned(experts, grams, method).T)


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_named(method: str) -> None:
    experts, grams, _ = layer()
    with pytest.raises(MergeError, match=rf"{method} failed on {NAME} .*a Gram matrix is \(in, in\).* got \(5, 5\)"):
        pruned(experts, {"a": {NAME: torch.eye(5)}}, method)
    more = {"a": {**experts["a"], "layers.1.fc.weight": torch.ones(2, 2)}}
    with pytest.raises(MergeError, match=r"failed on layers.1.fc.weight .*no inputs of it are known, and matrices=blo"):
        merge_state_dicts(None, more, method, {}, grams)
    with pytest.raises(MergeError, match=f"{method} prunes weights of linear layers in blocks"):
        merge_state_dicts(None, {"a": {"bias": torch.ones(2)}}, method, {}, {"a": {}})


def test_squares_of_inputs_are_enough() -> None:
    """A Gram matrix's diagonal gives what the matrix does; `moe_pruner` is told of no more."""
    weight, gram = torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 0.5], [0.5, 16.0]])
    found = {}
    for row, stat in (("wanda", gram), ("moe_pruner", gram.diagonal().clone())):
        stats = {"a": {"layers.0.fc1.weight": stat}}
        given = {"matrices": "blocks"}
        found[row] = merge_state_dicts(
            None, {"a": {"layers.0.fc1.weight": weight}}, row, given, roles=SampleRoles(), stats=stats
        )["layers.0.fc1.weight"]
    assert found["moe_pruner"].tolist() == [[0, 1], [0, 2]]
    assert torch.equal(found["wanda"], found["moe_pruner"])
