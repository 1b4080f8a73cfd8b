import copy
from typing import Any

import pytest
import torch
from torch import nn

from methods.mixed_linear import Dense, Gates, MixedLinear
from methods.mixtures import fix_gates
from methods.routed import Tokens
from methods.we_moe import WeMoeParams, we_moe
from tests.methods.samples import SampleRoles


class Roles(SampleRoles):
    """One feed-forward block, told by names of the module below."""

    experts = ("ant", "bee", "cat")
    n_features = 3

    @staticmethod
    def features(module: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return module(**inputs)

    def __init__(self, causal: bool = False) -> None:
        self.causal = causal

    def is_linear(self, name: str) -> bool:
        return name in ("block.mlp.0.weight", "block.mlp.2.weight")

    def is_transposed(self, name: str) -> bool:
        return False

    def is_merged(self, name: str) -> bool:
        return not name.startswith("head.")

    def is_causal(self, path: str) -> bool:
        return self.causal

    def feed_forwards(self) -> tuple[tuple[str, ...], ...]:
        return (("block.mlp",),)

    def points(self) -> tuple[str, ...]:
        return ("block", "head")

    def width_at(self, path: str) -> int:
        return 4 if path == "block" else 3


class Block(nn.Module):
    """Token mixing by a mean, then a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + tokens.mean(1, keepdim=True)
        return tokens + self.mlp(self.norm(tokens))


class Model(nn.Module):
    """(B, N, 4) -> (B, 3), inputs by keyword as pools feed them."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 3)
        self.register_buffer("running_mean", torch.zeros(3))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(pixel_values).mean(1)) - self.running_mean


INPUTS = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(3))


def models(n_experts: int = 3, kind: Any = Model) -> tuple[Any, list[Any]]:
    """A base and experts around it."""
    torch.manual_seed(0)
    base = kind()
    experts = [copy.deepcopy(base) for _ in range(n_experts)]
    with torch.no_grad():
        for expert in experts:
            for parameter in expert.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return base, experts


def built(base: Model, experts: list[Model], **params) -> Model:
    return we_moe(copy.deepcopy(base), experts, WeMoeParams(**params), Roles())


def task_arithmetic(base: Model, experts: list[Model], scale: list[float]) -> Model:
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            start = base.get_parameter(name)
            parameter.add_(sum(s * (e.get_parameter(name) - start) for s, e in zip(scale, experts, strict=True)))
    return merged


def test_by_hand() -> None:
    """A layer of one number: base 1, experts 2 and 4, gates 0.5 and 2 -> 1 + 0.5 * 1 + 2 * 3 = 7.5, by all paths."""
    held = Gates()
    layer = MixedLinear(torch.ones(1, 1), None, Dense(torch.tensor([[[1.0]], [[3.0]]])), held)
    for gates in (torch.tensor([0.5, 2.0]), torch.tensor([[0.5, 2.0]]), torch.tensor([[[0.5, 2.0]]])):
        held.now = gates
        assert layer(torch.full((1, 1, 1), 2.0)).item() == pytest.approx(15.0)


@pytest.mark.parametrize("router_layers", [1, 2])
def test_fresh_routers_give_task_arithmetic(router_layers: int) -> None:
    base, experts = models()
    module = built(base, experts, scale=0.4, router_layers=router_layers)
    expected = task_arithmetic(base, experts, [0.4] * 3)(INPUTS)
    torch.testing.assert_close(module(INPUTS), expected, atol=2e-2, rtol=1e-2)
    fix_gates(module, [0.4] * 3)
    torch.testing.assert_close(module(INPUTS), expected)


def test_gates_fixed_on_one_expert_give_its_feed_forward_block() -> None:
    base, experts = models()
    module = built(base, experts)
    fix_gates(module, [0.0, 1.0, 0.0])
    torch.testing.assert_close(module.block.mlp(INPUTS), experts[1].block.mlp(INPUTS))


def test_one_expert_and_gate_one_is_the_expert() -> None:
    base, experts = models(1)
    module = built(base, experts, scale=1.0)
    fix_gates(module, [1.0])
    torch.testing.assert_close(module(INPUTS), experts[0](INPUTS))


def test_copies_of_the_base_are_the_base() -> None:
    base, _ = models()
    module = built(base, [copy.deepcopy(base) for _ in range(3)])
    torch.testing.assert_close(module(INPUTS), base(INPUTS))


def test_routing_is_per_example() -> None:
    base, experts = models()
    module = built(base, experts)
    nn.init.normal_(module.block.mlp.router.net[0].weight)  # gates that differ between inputs
    nn.init.normal_(module.block.mlp.router.net[-1].weight)
    gates = module.block.mlp.gates(INPUTS).detach()
    assert float((gates[0] - gates[1]).abs().max()) > 0.1
    whole = module(INPUTS)
    torch.testing.assert_close(whole[2:3], module(INPUTS[2:3]))
    torch.testing.assert_close(whole.flip(0), module(INPUTS.flip(0)))
    for row in range(len(INPUTS)):  # each by task arithmetic of the block with its own gates
        expected = task_arithmetic(base, experts, gates[row].tolist()).block.mlp(INPUTS[row : row + 1])
        torch.testing.assert_close(module.block.mlp(INPUTS)[row : row + 1], expected, atol=1e-5, rtol=1e-4)


def test_only_routers_are_trainable() -> None:
    base, experts = models()
    module = built(base, experts)
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(name.startswith("block.mlp.router.") for name in trainable)
    module(INPUTS).square().sum().backward()
    assert any(float(module.get_parameter(name).grad.abs().max()) > 0 for name in trainable)


def test_training_the_routers_lowers_a_loss() -> None:
    base, experts = models()
    module = built(base, experts)
    target = experts[0].block.mlp(INPUTS).detach()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (module.block.mlp(INPUTS) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_experts_are_untouched_and_floating_buffers_averaged() -> None:
    base, experts = models(2)
    for value, expert in zip((1.0, 4.0), experts, strict=True):
        expert.running_mean.fill_(value)
    before = [copy.deepcopy(expert.state_dict()) for expert in experts]
    module = built(base, experts)
    assert module.running_mean.tolist() == [2.5] * 3
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    for expert, state in zip(experts, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in expert.state_dict().items())


def test_an_architecture_without_feed_forward_blocks_is_refused() -> None:
    base, experts = models()

    class Without(Roles):
        def feed_forwards(self) -> tuple[tuple[str, ...], ...]:
            return ()

    class Norms(Roles):
        def is_linear(self, name: str) -> bool:
            return False

    with pytest.raises(ValueError, match="this architecture has none that the pool can name"):
        we_moe(base, experts, WeMoeParams(), Without())
    with pytest.raises(ValueError, match=r"we_moe mixes linear layers, and block\.mlp\.0 is a Linear"):
        we_moe(base, experts, WeMoeParams(), Norms())


def test_padding_does_not_count_and_causal_gates_do_not_look_ahead() -> None:
    """Gates 1, 2, 6 of three tokens, the last (or first) of which is padding."""
    gates, tokens = torch.tensor([[[1.0], [2.0], [6.0]]]), Tokens()
    assert tokens.average(gates, causal=False, masked=True).tolist() == [[3.0]]
    assert tokens.average(gates, causal=True, masked=True).flatten().tolist() == [1.0, 1.5, 3.0]
    tokens.see(nn.Identity(), (), {"attention_mask": torch.tensor([[1, 1, 0]])})
    assert tokens.average(gates, causal=False, masked=True).tolist() == [[1.5]]
    assert tokens.average(gates, causal=False, masked=False).tolist() == [[3.0]]
    tokens.see(nn.Identity(), (), {"attention_mask": torch.tensor([[0, 1, 1]])})
    assert tokens.average(gates, causal=True, masked=True).flatten().tolist() == [0.0, 2.0, 4.0]


def test_a_causal_block_does_not_look_ahead() -> None:
    base, experts = models()
    module = we_moe(copy.deepcopy(base), experts, WeMoeParams(), Roles(causal=True))
    nn.init.normal_(module.block.mlp.router.net[-1].weight)
    changed = INPUTS.clone()
    changed[:, 4:] = 0
    torch.testing.assert_close(module.block.mlp(INPUTS)[:, :4], module.block.mlp(changed)[:, :4])
    assert not torch.allclose(module.block.mlp(INPUTS)[:, 4:], module.block.mlp(changed)[:, 4:])


def test_params_are_checked() -> None:
    with pytest.raises(ValueError, match="router_layers is 1 or 2, got 3"):
        WeMoeParams(router_layers=3)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        WeMoeParams(steps=0)
