import pytest
import torch

from harness.merge import merge_state_dicts
from methods.wudi import WudiParams
from tests.methods.samples import SampleRoles

NAME = "layers.0.fc1.weight"


def merged(base: torch.Tensor, *experts: torch.Tensor, name: str = NAME, **params) -> torch.Tensor:
    named = {f"e{index}": {name: expert} for index, expert in enumerate(experts)}
    return merge_state_dicts({name: base}, named, "wudi", params, roles=SampleRoles())[name]


def loss(x: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """As the paper writes it."""
    return sum(((x - delta) @ delta.T).square().sum() / delta.square().sum() for delta in deltas)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_first_step_by_hand() -> None:
    """Changes (1, 0) and (1, 1): from their sum (2, 1) the gradient is 2 (1, 0) + 2 (1, 0)(1, 1)^T (1, 1) / 2, so both
    entries move down by lr; a third entry that no expert has changed does not."""
    base = torch.tensor([[5.0, 5.0, 5.0]])
    one, two = base + torch.tensor([[1.0, 0.0, 0.0]]), base + torch.tensor([[1.0, 1.0, 0.0]])
    found = merged(base, one, two, steps=1, lr=0.01)
    torch.testing.assert_close(found - base, torch.tensor([[1.99, 0.99, 0.0]]))


@pytest.mark.parametrize("shape", [(5, 4), (3, 30)])  # by the Gram matrix, and by the rows
def test_the_gradient_written_out_is_that_of_the_loss(shape: tuple[int, int]) -> None:
    deltas = random(3, *shape)
    x = deltas.sum(0).requires_grad_()
    adam = torch.optim.Adam([x], lr=1e-3)
    for _ in range(5):
        adam.zero_grad()
        loss(x, deltas).backward()
        adam.step()
    found = merged(torch.zeros(shape), *deltas, steps=5, lr=1e-3)
    torch.testing.assert_close(found, x.detach(), atol=1e-5, rtol=1e-5)


def test_steps_lower_the_loss() -> None:
    deltas = random(3, 6, 8)
    losses = [float(loss(merged(torch.zeros(6, 8), *deltas, steps=n, lr=0.01), deltas)) for n in (0, 50, 300)]
    assert losses[0] > 1.5 * losses[1] > 2 * losses[2]
    torch.testing.assert_close(merged(torch.zeros(6, 8), *deltas, steps=0), deltas.sum(0))


def test_copies_come_near_the_expert_and_one_expert_is_itself() -> None:
    base, expert = torch.zeros(4, 4), random(4, 4)
    assert torch.equal(merged(base, expert, steps=50), expert)
    torch.testing.assert_close(merged(base, expert, expert, steps=800, lr=0.01), expert, atol=0.05, rtol=0)


def test_what_an_expert_leaves_as_it_is_costs_nothing() -> None:
    base, expert = torch.zeros(4, 4), random(4, 4)
    assert torch.equal(merged(base, expert, base, steps=20), merged(base, expert, steps=20))


def test_what_is_no_matrix_takes_the_mean() -> None:
    base, experts = torch.zeros(4), random(2, 4)
    torch.testing.assert_close(merged(base, *experts, name="layers.0.bias", scale=0.5), experts.mean(0) / 2)
    kernels = random(2, 4, 3, 2, 2)
    name = "layers.0.conv.weight"
    torch.testing.assert_close(merged(torch.zeros(4, 3, 2, 2), *kernels, name=name), kernels.mean(0))
    flat = merged(torch.zeros(4, 12), *kernels.flatten(2), steps=3)
    as_conv = merged(torch.zeros(4, 3, 2, 2), *kernels, name=name, steps=3, matrices="conv")
    torch.testing.assert_close(as_conv.flatten(1), flat)


@pytest.mark.parametrize(
    ("params", "message"),
    [({"lr": 0.0}, "lr must be positive"), ({"steps": -1}, "steps must be at least 0"), ({"matrices": "x"}, "one of")],
)
def test_bad_parameters(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WudiParams(**params)
