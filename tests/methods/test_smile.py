import copy

import pytest
import torch
from torch import nn

from methods.low_rank_experts import Smile
from methods.mixtures import fix_gates
from methods.smile import SmileParams, smile
from tests.methods.test_we_moe import models

FULL = {"k": 128, "gate_k": 128}
INPUTS = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    """A feed-forward block behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + self.mlp(self.norm(tokens))


class Model(nn.Module):
    """(B, N, 4) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(tokens).mean(1))


class Roles:
    """One block; the head comes after it."""

    n_layers = 1

    def is_buffer(self, name: str) -> bool:
        return False

    def is_merged(self, name: str) -> bool:
        return True

    def is_transposed(self, name: str) -> bool:
        return False

    def is_linear(self, name: str) -> bool:
        return name in ("block.mlp.0.weight", "block.mlp.2.weight", "head.weight")

    def layer_of(self, name: str) -> int:
        return 2 if name.startswith("head") else 1

    def mlps(self) -> tuple[str, ...]:
        return ("block.mlp",)


def built(base: Model, experts: list[Model], **params) -> Model:
    return smile(copy.deepcopy(base), experts, SmileParams(**params), Roles())


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


def test_by_hand() -> None:
    """The identity; one expert doubles the first number, the other adds 3 times the second to it and 1 to the bias."""
    base = linear([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0])
    first, second = linear([[2.0, 0.0], [0.0, 1.0]], [0.0, 0.0]), linear([[1.0, 3.0], [0.0, 1.0]], [1.0, 0.0])
    layer = Smile(base, [first, second], SmileParams(k=1, gate_k=1))
    tokens = torch.tensor([[5.0, 1.0], [-1.0, 2.0]])
    assert layer.gates(tokens).tolist() == [[1, 0], [0, 1]]  # |5| > |1|, |-1| < |2|
    torch.testing.assert_close(layer(tokens), torch.tensor([[10.0, 1.0], [6.0, 2.0]]))
    both = Smile(base, [first, second], SmileParams(k=1, gate_k=1, top_k=2))
    gate = float(torch.tensor([5.0, 1.0]).softmax(0)[0])
    torch.testing.assert_close(both(tokens)[0], torch.tensor([5 + 5 * gate + 4 * (1 - gate), 1.0]))


def test_a_direction_that_no_expert_changes_routes_nothing() -> None:
    """A change of rank one has one direction; at gate_k=2 the other counts as nothing."""
    base, first = linear([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]), linear([[1.0, 0.0], [0.0, 0.0]], [0.0, 0.0])
    layer = Smile(base, [first, linear([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0])], SmileParams(gate_k=2, top_k=2))
    torch.testing.assert_close(layer.gates(torch.tensor([3.0, 100.0])), torch.tensor([3.0, 0.0]).softmax(0))


@pytest.mark.parametrize("top_k", [1, 3])
def test_copies_of_one_expert_are_that_expert(top_k: int) -> None:
    base, experts = models(kind=Model)
    module = built(base, [experts[0]] * 3, top_k=top_k, average_rest=True, **FULL)
    module.head = experts[0].head  # comes after the blocks
    torch.testing.assert_close(module(INPUTS), experts[0](INPUTS), atol=1e-5, rtol=1e-5)


def test_copies_of_the_base_are_the_base() -> None:
    base, _ = models(kind=Model)
    assert torch.equal(built(base, [copy.deepcopy(base)] * 2)(INPUTS), base(INPUTS))


def test_gates_fixed_on_one_expert_give_its_layer() -> None:
    base, experts = models(kind=Model)
    layer = built(base, experts, **FULL).block.mlp[0]
    fix_gates(layer, [0.0, 1.0, 0.0])
    torch.testing.assert_close(layer(INPUTS), experts[1].block.mlp[0](INPUTS), atol=1e-5, rtol=1e-5)


def test_the_rank_bounds_the_error() -> None:
    base, experts = models(1, Model)
    change = experts[0].block.mlp[0].weight - base.block.mlp[0].weight
    for k in (1, 2, 3):
        layer = built(base, experts, k=k, gate_k=1).block.mlp[0]
        left = torch.linalg.svdvals(change - layer.up[0] @ layer.down[0, :k])[0]
        torch.testing.assert_close(left, torch.linalg.svdvals(change)[k], atol=1e-5, rtol=1e-4)


def test_a_router_never_looks_at_all_directions() -> None:
    """On all of them a token is as long for every expert, and rounding would choose."""
    base, experts = models(kind=Model)
    layer = built(base, experts, **FULL).block.mlp[0]
    gates = layer.gates(INPUTS)
    assert layer.router.gate_k == 2
    assert torch.equal(layer.gates(INPUTS[:1]), gates[:1])


def test_routing_is_per_token() -> None:
    base, experts = models(kind=Model)
    module = built(base, experts, gate_k=1)
    assert len({tuple(row) for row in module.block.mlp[0].gates(INPUTS).flatten(0, 1).tolist()}) > 1
    whole = module(INPUTS)
    torch.testing.assert_close(whole[2:3], module(INPUTS[2:3]))
    torch.testing.assert_close(whole.flip(0), module(INPUTS.flip(0)))


def test_nothing_is_trainable_and_only_blocks_have_experts() -> None:
    base, experts = models(kind=Model)
    module = built(base, experts)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert [path for path, one in module.named_modules() if isinstance(one, Smile)] == ["block.mlp.0", "block.mlp.2"]
    assert torch.equal(module.head.weight, base.head.weight)
    averaged = built(base, experts, average_rest=True).head.weight
    torch.testing.assert_close(averaged, torch.stack([expert.head.weight for expert in experts]).mean(0))


def test_the_structure_is_built_without_weights() -> None:
    """As a model that was written is opened: shapes from skeletons, then the tensors."""
    base, experts = models(kind=Model)
    made = built(base, experts, average_rest=True)
    with torch.device("meta"):
        hollow = smile(Model(), [Model() for _ in experts], SmileParams(average_rest=True), Roles())
    hollow.load_state_dict(made.state_dict(), strict=True, assign=True)
    assert torch.equal(hollow(INPUTS), made(INPUTS))
    with torch.device("meta"):
        fewer = smile(Model(), [Model()], SmileParams(), Roles())
    with pytest.raises(RuntimeError, match=r"size mismatch for block.mlp.0.down"):
        fewer.load_state_dict(made.state_dict(), assign=True)


def test_bad_input() -> None:
    base, experts = models(2, Model)
    with pytest.raises(ValueError, match="top_k=3 sends a token to more experts than there are, 2"):
        built(base, experts, top_k=3)
    with pytest.raises(ValueError, match=r"linear layers \(nn.Linear\) of blocks, and this LayerNorm has none"):
        smile(nn.LayerNorm(3), [nn.LayerNorm(3)], SmileParams(), Roles())
    for name in ("k", "gate_k", "top_k"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            SmileParams(**{name: 0})
