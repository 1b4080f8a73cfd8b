from typing import Any

import numpy as np
import pytest
import torch

from harness.merge import merge_state_dicts
from methods.ace import AceParams
from tests.methods.samples import SampleRoles

NAME = "layers.0.fc1.weight"


def merged(*changes: torch.Tensor, name: str = NAME, **params) -> torch.Tensor:
    """On a base of zeros."""
    experts = {f"e{index}": {name: change} for index, change in enumerate(changes)}
    return merge_state_dicts({name: torch.zeros_like(changes[0])}, experts, "ace", params, roles=SampleRoles())[name]


def random(n_experts: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((n_experts, *shape), generator=torch.Generator().manual_seed(seed))


def in_numpy(changes: torch.Tensor, epsilon: float, threshold: float, fraction: float) -> np.ndarray:
    """Equations 5 to 19 word by word, with a plain inverse and a full decomposition."""
    deltas = [change.double().numpy() for change in changes]
    n = deltas[0].shape[1]
    energies = np.array([(delta**2).sum() for delta in deltas])
    logs = np.log(energies)
    unlike = logs.var(ddof=1) / logs.mean() ** 2 > threshold
    centred = [delta - delta.mean(0) for delta in deltas]
    grams = [own.T @ own for own in centred]
    traces = [np.trace(gram) if unlike else 1.0 for gram in grams]
    scaled = [gram / trace for gram, trace in zip(grams, traces, strict=True)]
    regular = [gram + epsilon / trace * np.eye(n) for gram, trace in zip(scaled, traces, strict=True)]
    prior = np.ones((n, 1)) @ sum(scaled).mean(0, keepdims=True) / (energies.mean() if unlike else 1)
    right = sum(own @ gram for own, gram in zip(centred, regular, strict=True))
    first = right @ np.linalg.inv(sum(regular) + prior)
    if not unlike:
        return first
    mean = sum(regular) / len(regular)
    rest = sum(delta @ (gram - mean) for delta, gram in zip(deltas, scaled, strict=True))
    u, s, vh = np.linalg.svd(first + rest, full_matrices=False)
    k = int(len(s) * fraction)
    return first + s[:k].mean() * u[:, :k] @ vh[:k]


@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.1), (0.01, 1.0, 30.0)], ids=["alike", "unlike"])
@pytest.mark.parametrize("shape", [(9, 6), (5, 8)])
def test_as_the_paper_writes_it(shape: tuple[int, int], sizes: tuple[float, ...]) -> None:
    changes = random(3, *shape) * torch.tensor(sizes)[:, None, None]
    given: dict[str, Any] = {"epsilon": 1e-2, "threshold": 0.3, "fraction": 0.5}
    np.testing.assert_allclose(merged(*changes, **given), in_numpy(changes, **given), atol=2e-5)


def test_by_hand() -> None:
    """Rows (1, 0), (-1, 0) and rows (0, 2), (0, -2): covariances diag(2, 0) and diag(0, 8), their sum's mean row is
    (1, 4). Without epsilon x solves x (diag(2, 8) + 1 (1, 4)) = [[2, 16], [-2, -16]]."""
    one, two = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, -2.0]])
    system = torch.tensor([[3.0, 4.0], [1.0, 12.0]])
    expected = torch.linalg.solve(system.T, torch.tensor([[2.0, 16.0], [-2.0, -16.0]]).T).T
    found = merged(one, two, epsilon=1e-9, threshold=100.0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(merged(one, two, epsilon=1e-9, threshold=100.0, scale=0.5), expected / 2)


def test_who_tells_no_covariance_is_left_out() -> None:
    changes = random(2, 6, 4)
    shifted = torch.ones(6, 4)
    for silent in (torch.zeros(6, 4), shifted):
        torch.testing.assert_close(merged(*changes, silent), merged(*changes))
    row = random(3, 1, 4)
    torch.testing.assert_close(merged(*row), row.mean(0))
    torch.testing.assert_close(merged(shifted, 3 * shifted), 2 * shifted)


def test_what_is_no_matrix_takes_the_mean() -> None:
    changes = random(2, 4)
    torch.testing.assert_close(merged(*changes, name="layers.0.bias"), changes.mean(0))
    table = random(2, 6, 4)
    name = "embeddings.position_embedding.weight"
    torch.testing.assert_close(merged(*table, name=name, matrices="linear"), table.mean(0))
    torch.testing.assert_close(merged(*table, name=name), merged(*table))


@pytest.mark.parametrize(
    ("name", "value"), [("epsilon", 0.0), ("fraction", 0.0), ("threshold", float("nan")), ("matrices", "some")]
)
def test_bad_parameters(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        AceParams(**{name: value})
