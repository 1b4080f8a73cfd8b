import copy

import torch

from methods.dawe import DaweParams, dawe
from methods.mixtures import fix_gates
from tests.methods.test_we_moe import INPUTS, Model, Roles, models, task_arithmetic


def built(base: Model, experts: list[Model], **params) -> torch.nn.Module:
    return dawe(copy.deepcopy(base), experts, DaweParams(**params), Roles())


def same_heads(base: Model, experts: list[Model]) -> list[Model]:
    """What the pool does not merge is everyone's."""
    for expert in experts:
        expert.head.load_state_dict(base.head.state_dict())
    return experts


def test_every_example_is_answered_by_task_arithmetic_with_its_gates() -> None:
    base, experts = models()
    module = built(base, same_heads(base, experts))
    for layer in module.router.net[::2]:
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    gates = module.gates({"pixel_values": INPUTS}).detach()
    assert float((gates[0] - gates[1]).abs().max()) > 0.01
    for row in range(len(INPUTS)):
        expected = task_arithmetic(base, experts, gates[row].tolist())(INPUTS[row : row + 1])
        torch.testing.assert_close(module(pixel_values=INPUTS)[row : row + 1], expected, atol=1e-5, rtol=1e-4)


def test_a_gate_of_one_is_the_expert_and_what_is_not_merged_stays() -> None:
    base, experts = models()
    module = built(base, same_heads(base, experts))
    fix_gates(module, [0.0, 0.0, 1.0])
    torch.testing.assert_close(module(pixel_values=INPUTS), experts[2](INPUTS))
    with torch.no_grad():
        module.body.head.bias.add_(1)  # another head, say of another task
    torch.testing.assert_close(module(pixel_values=INPUTS), experts[2](INPUTS) + 1)


def test_only_the_network_is_trainable_and_experts_are_untouched() -> None:
    base, experts = models()
    before = copy.deepcopy(experts[0].state_dict())
    module = built(base, experts)
    trainable = {name: own for name, own in module.named_parameters() if own.requires_grad}
    assert all(name.startswith("router.") for name in trainable)
    module(pixel_values=INPUTS).square().sum().backward()
    assert max(float(own.grad.abs().max()) for own in trainable.values()) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in experts[0].state_dict().items())
