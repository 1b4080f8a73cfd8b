import copy

import pytest
import torch

from methods.mixtures import Change, fix_gates
from methods.twin_merging import TwinMergingParams, twin_merging
from tests.methods.test_dawe import same_heads
from tests.methods.test_we_moe import INPUTS, Model, Roles, models, task_arithmetic


def built(base: Model, experts: list[Model], **params) -> torch.nn.Module:
    return twin_merging(copy.deepcopy(base), experts, TwinMergingParams(**params), Roles())


def test_by_hand() -> None:
    """Half of two directions: of diag(3, 1) the 3, of diag(2, 4) the 4; vectors are kept."""
    change = Change(torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 4.0]))]), 0.5)
    torch.testing.assert_close(change.mixed(torch.tensor([0.5, 2.0])), torch.diag(torch.tensor([1.5, 8.0])))
    assert Change(torch.tensor([[1.0], [3.0]]), 0.5).mixed(torch.tensor([2.0, 1.0])).tolist() == [5.0]


def test_the_shared_model_and_all_directions_of_one_expert_are_that_expert() -> None:
    base, experts = models()
    same_heads(base, experts)
    module = built(base, experts, density=1.0)
    fix_gates(module, [0.0, 0.0, 0.0])
    torch.testing.assert_close(module(pixel_values=INPUTS), task_arithmetic(base, experts, [0.3] * 3)(INPUTS))
    fix_gates(module, [0.0, 1.0, 0.0])
    torch.testing.assert_close(module(pixel_values=INPUTS), experts[1](INPUTS))


def test_gates_are_shares() -> None:
    base, experts = models()
    gates = built(base, experts).gates({"pixel_values": INPUTS})
    assert gates.shape == (5, 3)
    torch.testing.assert_close(gates.sum(1), torch.ones(5))


def test_the_router_learns_to_tell_tasks_apart() -> None:
    base, experts = models()
    module = built(base, experts)
    optimizer = torch.optim.Adam([own for own in module.parameters() if own.requires_grad], lr=0.02)
    tasks = [{"pixel_values": INPUTS + 3 * task} for task in range(3)]
    for _ in range(150):
        optimizer.zero_grad()
        loss = sum(module.lesson.loss(module, task, inputs).mean() for task, inputs in enumerate(tasks))
        loss.backward()
        optimizer.step()
    assert [module.gates(inputs).argmax(1).tolist() for inputs in tasks] == [[task] * 5 for task in range(3)]


def test_params_are_checked() -> None:
    with pytest.raises(ValueError, match="density is a share"):
        TwinMergingParams(density=1.5)
