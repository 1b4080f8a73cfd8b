from typing import Any

import pytest
import torch

from harness.merge import merge_state_dicts
from methods.doge_ta import DogeTaParams
from tests.methods.samples import SampleRoles

NAME, OTHER = "layers.0.fc1.weight", "layers.0.q_proj.weight"
State = dict[str, torch.Tensor]


def merged(changes: list[State], **params) -> State:
    """On a base of zeros."""
    base = {name: torch.zeros_like(tensor) for name, tensor in changes[0].items()}
    experts = {f"e{index}": change for index, change in enumerate(changes)}
    return merge_state_dicts(base, experts, "doge_ta", params, roles=SampleRoles())


def random(n_experts: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((n_experts, *shape), generator=torch.Generator().manual_seed(seed))


def test_without_steps_each_change_is_brought_to_one_norm() -> None:
    """(3, 4) and (0, 2) of norm 5 and 2, to a norm of 10 each: (6, 8) and (0, 10)."""
    changes = [{NAME: torch.tensor([[3.0, 4.0]])}, {NAME: torch.tensor([[0.0, 2.0]])}]
    found = merged(changes, steps=0, eta=10.0, density=1.0)[NAME]
    torch.testing.assert_close(found, torch.tensor([[6.0, 18.0]]))
    assert torch.equal(merged([*changes, {NAME: torch.zeros(1, 2)}], steps=0, eta=10.0, density=1.0)[NAME], found)


def test_trimmed_over_all_linear_layers() -> None:
    """Half of each expert's eight: the first keeps its first matrix alone; a bias does not count."""
    big, small = torch.tensor([[4.0, 5.0], [6.0, 7.0]]), torch.ones(2, 2) / 10
    change = {NAME: big, OTHER: small, "layers.0.bias": torch.full((50,), 9.0)}
    found = merged([change], steps=0, eta=1.0, density=0.5)
    torch.testing.assert_close(found[NAME], big / big.norm())
    assert not found[OTHER].any()
    torch.testing.assert_close(found["layers.0.bias"], change["layers.0.bias"])
    assert not merged([change], steps=0, others="base")["layers.0.bias"].any()


@pytest.mark.parametrize("shape", [(8, 6), (4, 12)])
def test_the_modification_is_that_of_autograd(shape: tuple[int, int]) -> None:
    """The authors' loss, a full decomposition, torch's own Adam."""
    changes = random(2, *shape)
    lengths = 0.5 / changes.flatten(1).norm(dim=1)[:, None, None]
    leading = [torch.linalg.svd(change, full_matrices=False)[0][:, : min(shape) // 2] for change in changes]
    basis = torch.linalg.svd(torch.cat(leading, dim=1), full_matrices=False)[0][:, : min(shape) // 3]
    shared = torch.zeros(shape, requires_grad=True)
    adam = torch.optim.Adam([shared], lr=0.01)
    for _ in range(10):
        total = (lengths * (changes + shared)).sum(0)
        loss = ((changes * (changes - total)).sum(2) ** 2).sum()
        (shared.grad,) = torch.autograd.grad(loss, shared)
        shared.grad -= basis @ (basis.T @ shared.grad)
        adam.step()
    expected = (lengths * (changes + shared.detach())).sum(0)
    given = {"steps": 10, "lr": 0.01, "subspace": 3, "eta": 0.5, "density": 1.0}
    found = merged([{NAME: change} for change in changes], **given)[NAME]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert float((shared.detach()).abs().max()) > 0.05


def test_where_there_is_no_matrix() -> None:
    changes = [{"layers.0.bias": torch.tensor([2.0, 4.0])}, {"layers.0.bias": torch.tensor([4.0, 0.0])}]
    torch.testing.assert_close(merged(changes, scale=0.5)["layers.0.bias"], torch.tensor([1.5, 1.0]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("eta", -1.0), ("density", 30), ("subspace", 0), ("lr", 0.0), ("steps", -1), ("others", "sum"), ("matrices", "")],
)
def test_bad_parameters(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        DogeTaParams(**{name: value})
