import copy

import pytest
import torch
from torch import nn

from methods.ensembles import (
    MaxModelPredictorParams,
    SimpleEnsembleParams,
    WeightedEnsembleParams,
    max_model_predictor,
    simple_ensemble,
    weighted_ensemble,
)
from tests.methods.test_we_moe import Roles


class Model(nn.Module):
    """Inputs by keyword, as pools feed them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(pixel_values)))


INPUTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
HEAD = torch.randn(3, 7, generator=torch.Generator().manual_seed(4))  # (D, K)


def constant(*values: float) -> list[Model]:
    """Experts that answer one number whatever comes."""
    experts = [Model() for _ in values]
    for expert, value in zip(experts, values, strict=True):
        nn.init.zeros_(expert.fc2.weight)
        nn.init.constant_(expert.fc2.bias, value)
    return experts


def ensemble(*experts: nn.Module) -> nn.Module:
    return simple_ensemble(None, experts, SimpleEnsembleParams(), Roles())


def weighted(experts: list[Model], **params) -> torch.Tensor:
    return weighted_ensemble(None, experts, WeightedEnsembleParams(**params), Roles())(pixel_values=INPUTS)


def test_by_hand() -> None:
    """Constant experts 1 and 4: the mean is 2.5, weighted 3 to 1 it is 1.75, and as weights are given 7."""
    assert torch.equal(ensemble(*constant(1.0, 4.0))(pixel_values=INPUTS), torch.full((5, 3), 2.5))
    assert torch.equal(weighted(constant(1.0, 4.0), weights=[3.0, 1.0]), torch.full((5, 3), 1.75))
    assert torch.equal(weighted(constant(1.0, 4.0), weights=[3.0, 1.0], normalize=False), torch.full((5, 3), 7.0))
    assert torch.equal(weighted(constant(1.0, 4.0)), torch.full((5, 3), 2.5))


def test_the_mean_of_the_outputs_not_of_the_weights() -> None:
    experts = [Model(seed) for seed in range(3)]
    expected = torch.stack([expert(INPUTS) for expert in experts]).mean(0)
    torch.testing.assert_close(ensemble(*experts)(pixel_values=INPUTS), expected)


def test_the_largest_logit_not_the_largest_number_of_an_embedding() -> None:
    experts = [Model(seed) for seed in range(3)]
    found = max_model_predictor(None, experts, MaxModelPredictorParams(), Roles())(pixel_values=INPUTS) @ HEAD
    expected = torch.stack([expert(INPUTS) @ HEAD for expert in experts]).amax(0)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, torch.stack([expert(INPUTS) for expert in experts]).amax(0) @ HEAD)


def test_order_of_experts_is_irrelevant_and_nothing_is_trained() -> None:
    experts = [Model(seed) for seed in range(3)]
    torch.testing.assert_close(ensemble(*experts)(pixel_values=INPUTS), ensemble(*experts[::-1])(pixel_values=INPUTS))
    assert not any(parameter.requires_grad for parameter in ensemble(*experts).parameters())
    before = copy.deepcopy(experts[0].state_dict())
    weighted(experts, weights=[1.0, 2.0, 3.0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in experts[0].state_dict().items())


def test_weights_are_checked() -> None:
    with pytest.raises(ValueError, match=r"weights sum to 0 and cannot be normalized, got \[1.0, -1.0\]"):
        WeightedEnsembleParams(weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="weights lists 1 numbers for 2 experts"):
        weighted(constant(1.0, 4.0), weights=[1.0])
