import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.merge import merge_state_dicts

# Six entries, density 0.5: three kept by each expert, marked *.
BASE = torch.ones(6)
DELTAS = torch.tensor(
    [
        [4.0, -1.0, 3.0, 0.5, 2.0, -0.5],  # *, ., *, ., *, .
        [2.0, -5.0, -4.0, 1.0, 0.5, 6.0],  # ., *, *, ., ., *
    ]
)  # fmt: skip


def merged(deltas: torch.Tensor = DELTAS, **params) -> list[float]:
    """The merged change."""
    experts = {f"e{index}": {"w": BASE + delta} for index, delta in enumerate(deltas)}
    return (merge_state_dicts({"w": BASE}, experts, "ties", params)["w"] - BASE).tolist()


def test_by_hand() -> None:
    """Trimmed (4, 0, 3, 0, 2, 0) and (0, -5, -4, 0, 0, 6); elected + - - 0 + +; of the third only -4 agrees."""
    assert merged(density=0.5) == [4.0, -5.0, -4.0, 0.0, 2.0, 6.0]
    assert merged(density=0.5, scale=0.5) == [2.0, -2.5, -2.0, 0.0, 1.0, 3.0]


def test_disjoint_by_hand() -> None:
    """Nothing trimmed: sums (6, -6, -1, 1.5, 2.5, 5.5)."""
    assert merged(density=1.0, disjoint="mean") == [3.0, -3.0, -4.0, 0.75, 1.25, 6.0]
    assert merged(density=1.0, disjoint="sum") == [6.0, -6.0, -4.0, 1.5, 2.5, 6.0]
    assert merged(density=1.0, disjoint="max") == [4.0, -5.0, -4.0, 1.0, 2.0, 6.0]


def test_weights_by_hand() -> None:
    """Nothing trimmed, weighed (4, -1, 3, .5, 2, -.5) and (1, -2.5, -2, .5, .25, 3): the third entry's vote turns."""
    weights = [1.0, 0.5]
    assert merged(density=1.0, disjoint="sum", weights=weights) == [5.0, -3.5, 3.0, 1.0, 2.25, 3.0]
    mean = merged(density=1.0, disjoint="mean", weights=weights)
    assert mean == pytest.approx([5 / 1.5, -3.5 / 1.5, 3.0, 1 / 1.5, 2.25 / 1.5, 6.0])
    assert merged(density=1.0, disjoint="max", weights=weights) == [4.0, -2.5, 3.0, 0.5, 2.0, 3.0]


def test_weights_of_one_change_no_bit() -> None:
    deltas = torch.randn((3, 6), generator=torch.Generator().manual_seed(3))
    for params in ({}, {"disjoint": "sum"}, {"disjoint": "max"}, {"scope": "tensor"}):
        assert merged(deltas, weights=[1.0, 1.0, 1.0], **params) == merged(deltas, **params)


def test_a_density_for_each_expert() -> None:
    """Three of the first, (4, 0, 3, 0, 2, 0); all of the second."""
    assert merged(densities=[0.5, 1.0], disjoint="sum") == [6.0, -5.0, -4.0, 1.0, 2.5, 6.0]
    assert merged(densities=[0.5, 0.5], density=0.9) == merged(density=0.5)
    with pytest.raises(ValueError, match="densities lists 1 numbers for 2 experts"):
        merged(densities=[0.5])
    with pytest.raises(ValueError, match=r"densities is a share in \(0, 1\], got 5"):
        merged(densities=[0.5, 5.0])
    with pytest.raises(ValueError, match="weights lists 3 numbers for 2 experts"):
        merged(weights=[1.0, 2.0, 3.0])


def test_a_vote_of_zero_merges_nothing() -> None:
    for disjoint in ("mean", "sum", "max"):
        assert merged(torch.tensor([[2.0] * 6, [-2.0] * 6]), density=1.0, disjoint=disjoint) == [0.0] * 6


def test_scope() -> None:
    """Over the model the large tensor keeps all; each on its own, both keep half."""
    base = {"small": torch.zeros(2), "large": torch.zeros(2)}
    experts = {"a": {"small": torch.tensor([0.1, 0.2]), "large": torch.tensor([10.0, 20.0])}}
    over_model = merge_state_dicts(base, experts, "ties", {"density": 0.5, "scope": "model"})
    assert over_model["small"].tolist() == [0.0, 0.0]
    assert over_model["large"].tolist() == [10.0, 20.0]
    by_tensor = merge_state_dicts(base, experts, "ties", {"density": 0.5, "scope": "tensor"})
    torch.testing.assert_close(by_tensor["small"], torch.tensor([0.0, 0.2]))
    assert by_tensor["large"].tolist() == [0.0, 20.0]


def test_each_expert_has_its_own_threshold() -> None:
    deltas = torch.tensor([[100.0, 200.0, 300.0, 400.0, 500.0, 600.0], [0.0, 0.0, 0.0, 3.0, 2.0, 1.0]])
    assert merged(deltas, density=0.5, disjoint="sum") == [0.0, 0.0, 0.0, 403.0, 502.0, 601.0]


@given(
    n_entries=st.integers(1, 40), n_experts=st.integers(1, 4), density=st.floats(0.05, 1.0),
    disjoint=st.sampled_from(["mean", "sum", "max"]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_against_numpy(n_entries: int, n_experts: int, density: float, disjoint: str, seed: int) -> None:
    """Algorithm 1 in float64, on entries without equal magnitudes."""
    random = np.random.default_rng(seed)
    deltas = np.stack([random.permutation(n_entries) + 1.0 for _ in range(n_experts)])
    deltas *= random.choice([-1.0, 1.0], deltas.shape)
    experts = {f"e{index}": {"w": torch.tensor(delta, dtype=torch.float32)} for index, delta in enumerate(deltas)}
    params = {"density": density, "disjoint": disjoint}
    ours = merge_state_dicts({"w": torch.zeros(n_entries)}, experts, "ties", params)["w"]

    kept = max(1, int(density * n_entries + 1e-6))
    trimmed = np.where(np.abs(deltas) > n_entries - kept, deltas, 0)
    sign = np.sign(trimmed.sum(0))
    agree = np.where(np.sign(trimmed) == sign, trimmed, 0)
    counts = np.maximum((agree != 0).sum(0), 1)
    expected = {"mean": agree.sum(0) / counts, "sum": agree.sum(0), "max": np.abs(agree).max(0) * sign}[disjoint]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.0, 20.0, -0.2, float("nan")])
def test_density_is_a_share(density: float) -> None:
    with pytest.raises(ValueError, match=r"density is a share in \(0, 1\], got .*percentages are not accepted"):
        merged(density=density)


def test_words_are_checked() -> None:
    with pytest.raises(ValueError, match="scope is one of model, tensor; got 'layer'"):
        merged(scope="layer")
    with pytest.raises(ValueError, match="disjoint is one of mean, sum, max; got 'median'"):
        merged(disjoint="median")


def test_signs_by_count_and_norms_given_back() -> None:
    """One large change is outvoted by two; of what is left of 3, 1 and 2 the norm of all, 6, is made."""
    base = {"w": torch.zeros(3)}
    changes = {"a": [9.0, 0.0, 0.0], "b": [-1.0, 0.0, 0.0], "c": [-3.0, 0.0, 0.0]}
    experts = {name: {"w": torch.tensor(values)} for name, values in changes.items()}
    params = {"density": 1.0, "elect": "count"}
    assert merge_state_dicts(base, experts, "ties", params)["w"].tolist() == [-2.0, 0.0, 0.0]
    experts = {"a": {"w": torch.tensor([3.0, 1.0, 2.0])}}
    for scope in ("model", "tensor"):
        params = {"density": 0.67, "rescale": "l1", "scope": scope}
        torch.testing.assert_close(merge_state_dicts(base, experts, "ties", params)["w"], torch.tensor([3.6, 0.0, 2.4]))
