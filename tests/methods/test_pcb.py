import numpy as np
import pytest
import torch

from harness.merge import merge_state_dicts
from methods.pcb import PcbParams


def in_numpy(deltas: np.ndarray, density: float, clip: float) -> np.ndarray:
    """The merged change, of (T, n) float64."""
    n_experts, n = deltas.shape
    sizes = np.sort(np.abs(deltas), axis=1)
    n_out = int(clip * n)
    low, high = sizes[:, [n_out]], sizes[:, [n - 1 - n_out]]
    clipped = np.clip(np.abs(deltas), low, high)
    scores = np.exp(n_experts * ((clipped - low) / (high - low)) ** 2) * np.tanh(deltas * deltas.sum(0))
    last = -np.sort(-scores, axis=1)[:, [max(1, int(density * n)) - 1]]
    shares = np.clip((scores - last) / (scores.max(1, keepdims=True) - last), 0, None)
    return (shares * np.sign(deltas) * clipped).sum(0) / np.maximum(shares.sum(0), 1e-12)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_as_in_numpy(clip: float, scope: str) -> None:
    generator = np.random.default_rng(0)
    deltas = generator.standard_normal((3, 200))
    base = {"v": torch.zeros(10, 4), "w": torch.zeros(160)}
    rows = [torch.from_numpy(row).float() for row in deltas]
    experts = {f"e{i}": {"v": row[:40].reshape(10, 4), "w": row[40:]} for i, row in enumerate(rows)}
    params = {"density": 0.2, "clip": clip, "scope": scope, "scale": 0.5}
    found = merge_state_dicts(base, experts, "pcb", params)
    if scope == "model":
        expected = in_numpy(deltas, 0.2, clip)
    else:
        expected = np.concatenate([in_numpy(part, 0.2, clip) for part in (deltas[:, :40], deltas[:, 40:])])
    flat = np.concatenate([found["v"].numpy().ravel(), found["w"].numpy()])
    np.testing.assert_allclose(flat, 0.5 * expected, atol=1e-5)
    assert 20 < np.count_nonzero(flat) < 120


def test_what_goes_against_the_others_never_wins() -> None:
    experts = {"a": {"w": torch.tensor([3.0, 1.0])}, "b": {"w": torch.tensor([-1.0, 1.0])}}
    params = {"density": 1.0, "scale": 1.0, "clip": 0.0}
    assert merge_state_dicts({"w": torch.zeros(2)}, experts, "pcb", params)["w"].tolist() == [3.0, 1.0]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"clip is a share in \[0, 0.5\), got 0.5"):
        PcbParams(clip=0.5)
