from typing import Any

import pytest
import torch

from harness.merge import merge_state_dicts
from methods.awd import AwdParams, coefficients
from methods.kinds import Piece

State = dict[str, torch.Tensor]


def random(n_experts: int, size: int = 40, common: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Changes with something in common."""
    own = torch.randn(n_experts + 1, size, generator=torch.Generator().manual_seed(seed))
    return own[:-1] + common * own[-1]


def found(changes: torch.Tensor, **params) -> torch.Tensor:
    piece = Piece("all", torch.zeros(changes.shape[1]), changes)
    return torch.tensor(coefficients(lambda function, limit=None: [function(piece)], AwdParams(**params)))


def cosines(changes: torch.Tensor) -> torch.Tensor:
    units = torch.nn.functional.normalize(changes, dim=1)
    return (units @ units.T)[~torch.eye(len(changes), dtype=torch.bool)].abs()


def by_descent(changes: torch.Tensor, lr: float, alpha: float, steps: int) -> torch.Tensor:
    """The paper's Algorithm 1 on the vector itself, gradients by autograd."""
    redundant = torch.zeros_like(changes[0], requires_grad=True)
    for _ in range(steps):
        (slope,) = torch.autograd.grad(cosines(changes - redundant).mean(), redundant)
        with torch.no_grad():
            moved = redundant - lr * slope
            redundant.copy_(moved * max(0.0, 1 - lr * alpha / float(moved.norm())))
    return redundant.detach()


@pytest.mark.parametrize("n_experts", [2, 4])
def test_descent_in_the_span_is_descent_on_the_vector(n_experts: int) -> None:
    changes = random(n_experts).double()
    given: dict[str, Any] = {"lr": 1.0, "alpha": 0.01, "steps": 30}
    redundant = by_descent(changes, **given)
    assert float(redundant.norm()) > 0.5
    expected = (changes - redundant).sum(0)
    torch.testing.assert_close(found(changes.float(), **given).double() @ changes, expected, atol=1e-4, rtol=1e-4)


def test_changes_become_less_alike() -> None:
    changes = random(3)
    shares = (1 - found(changes, lr=1.0, alpha=0.01, steps=200)) / 3
    assert float(cosines(changes - shares @ changes).mean()) < 0.5 * float(cosines(changes).mean())


def test_nothing_in_common_nothing_taken() -> None:
    """Orthogonal changes, one expert, copies, or a high price: task arithmetic."""
    for changes, params in (
        (torch.eye(3), {}),
        (random(1), {}),
        (random(1).repeat(3, 1), {"lr": 1.0}),
        (random(3), {"alpha": 5.0}),
        (random(3), {"steps": 0}),
    ):
        torch.testing.assert_close(found(changes, **params), torch.ones(len(changes)))


def test_one_vector_for_the_model_or_one_for_each_tensor() -> None:
    changes = random(2)
    experts = {f"e{i}": {"a": change[:20], "b": change[20:]} for i, change in enumerate(changes)}
    base = {name: torch.zeros(20) for name in "ab"}
    given = {"lr": 1.0, "alpha": 0.01, "steps": 20}
    whole = merge_state_dicts(base, experts, "awd", given)
    torch.testing.assert_close(torch.cat([whole["a"], whole["b"]]), 0.3 * found(changes, **given) @ changes)
    own = merge_state_dicts(base, experts, "awd", {**given, "scope": "tensor"})["a"]
    torch.testing.assert_close(own, 0.3 * found(changes[:, :20], **given) @ changes[:, :20])


@pytest.mark.parametrize(("name", "value"), [("alpha", -0.1), ("lr", 0.0), ("steps", -1), ("scope", "layer")])
def test_bad_parameters(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        AwdParams(**{name: value})
