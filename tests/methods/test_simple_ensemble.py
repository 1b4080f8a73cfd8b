import copy

import torch
from torch import nn

from methods.simple_ensemble import SimpleEnsembleParams, simple_ensemble
from tests.methods.samples import SampleRoles


class Model(nn.Module):
    """Inputs by keyword, as pools feed them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(pixel_values)))


INPUTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


def ensemble(*experts: nn.Module) -> nn.Module:
    return simple_ensemble(None, experts, SimpleEnsembleParams(), SampleRoles())


def test_by_hand() -> None:
    """Constant experts 1 and 4: the mean is 2.5."""
    experts = [Model(), Model()]
    for expert, value in zip(experts, (1.0, 4.0), strict=True):
        nn.init.zeros_(expert.fc2.weight)
        nn.init.constant_(expert.fc2.bias, value)
    assert torch.equal(ensemble(*experts)(pixel_values=INPUTS), torch.full((5, 3), 2.5))


def test_the_mean_of_the_outputs_not_of_the_weights() -> None:
    experts = [Model(seed) for seed in range(3)]
    expected = torch.stack([expert(INPUTS) for expert in experts]).mean(0)
    torch.testing.assert_close(ensemble(*experts)(pixel_values=INPUTS), expected)


def test_copies_of_one_expert_give_that_expert() -> None:
    expert = Model()
    built = ensemble(*[copy.deepcopy(expert) for _ in range(3)])
    torch.testing.assert_close(built(pixel_values=INPUTS), expert(INPUTS))


def test_a_row_does_not_depend_on_the_others() -> None:
    built = ensemble(Model(0), Model(1))
    torch.testing.assert_close(built(pixel_values=INPUTS)[2:3], built(pixel_values=INPUTS[2:3]))


def test_order_of_experts_is_irrelevant_and_nothing_is_trained() -> None:
    experts = [Model(seed) for seed in range(3)]
    torch.testing.assert_close(ensemble(*experts)(pixel_values=INPUTS), ensemble(*experts[::-1])(pixel_values=INPUTS))
    assert not any(parameter.requires_grad for parameter in ensemble(*experts).parameters())
