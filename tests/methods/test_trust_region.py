import numpy as np
import pytest
import torch

from harness.merge import MergeError, merge_state_dicts
from methods.trust_region import sensitivity

BASE = {"w": torch.zeros(4)}
EXPERTS = {"a": {"w": torch.tensor([1.0, 2.0, 0.0, 1.0])}, "b": {"w": torch.tensor([1.0, 1.0, 3.0, -1.0])}}
GRADIENTS = {"a": {"w": torch.tensor([1.0, 0.0, 5.0, 0.0])}, "b": {"w": torch.tensor([0.0, 3.0, 1.0, 0.0])}}


def merged(experts=EXPERTS, stats=GRADIENTS, **params) -> list[float]:
    return merge_state_dicts(BASE, experts, "trust_region", {"scale": 1.0, **params}, stats)["w"].tolist()


def test_by_hand() -> None:
    """Omega is 1 * 1 + 0 * 1, 0 * 1 + 3 * 2, 5 * 3 + 1 * 0, 0: of four entries one is dropped, then two."""
    assert merged(density=1.0) == [2, 3, 3, 0]
    assert merged(density=0.75) == [2, 3, 0, 0]
    assert merged(density=0.5) == [2, 0, 0, 0]


def test_less_than_one_entry_is_none() -> None:
    assert merged(density=0.76) == [2, 3, 3, 0]


def test_without_data_changes_stand_for_gradients() -> None:
    """Omega is twice the product of the changes in magnitude: 2, 4, 0, 2."""
    result = merge_state_dicts(BASE, EXPERTS, "trust_region_zero_shot", {"scale": 1.0, "density": 0.75})
    assert result["w"].tolist() == [2, 0, 3, 0]


@pytest.mark.parametrize("method", ["trust_region", "trust_region_zero_shot"])
def test_without_conflict_it_is_task_arithmetic(method: str) -> None:
    """One expert has nobody to disturb; FusionBench leaves the base as it is."""
    one = {"a": EXPERTS["a"]}
    stats = {"a": GRADIENTS["a"]} if method == "trust_region" else None
    result = merge_state_dicts(BASE, one, method, {"scale": 0.5, "density": 0.5}, stats)
    assert result["w"].tolist() == [0.5, 1.0, 0.0, 0.5]


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_against_numpy(scope: str) -> None:
    random = np.random.default_rng(0)
    base = {name: random.normal(size=size) for name, size in (("u", (30, 20)), ("v", (50,)))}
    deltas = {name: random.normal(size=(4, *start.shape)) * (3 if name == "u" else 1) for name, start in base.items()}
    gradients = {name: random.normal(size=(4, *start.shape)) ** 2 for name, start in base.items()}
    omega = {
        name: sum(gradients[name][i] * abs(deltas[name][j]) for i in range(4) for j in range(4) if i != j)
        for name in base
    }
    whole = np.concatenate([part.ravel() for part in omega.values()])
    expected = {}
    for name, part in omega.items():
        among = whole if scope == "model" else part.ravel()
        n_dropped = int(0.2 * among.size + 1e-6)
        kept = part < np.sort(among)[-n_dropped]
        expected[name] = base[name] + 0.4 * deltas[name].sum(0) * kept

    def state(arrays) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}

    experts = {f"e{i}": state({name: base[name] + deltas[name][i] for name in base}) for i in range(4)}
    stats = {f"e{i}": state({name: gradients[name][i] for name in base}) for i in range(4)}
    params = {"density": 0.8, "scale": 0.4, "scope": scope}
    ours = merge_state_dicts(state(base), experts, "trust_region", params, stats)
    for name, wanted in expected.items():
        np.testing.assert_allclose(ours[name].numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_sensitivity_of_three() -> None:
    """(10 + 100) * 3 + (1 + 100) * 5 + (1 + 10) * 7."""
    assert sensitivity(torch.tensor([[3.0], [-5.0], [7.0]]), torch.tensor([[1.0], [10.0], [100.0]])).item() == 912


def test_bad_gradients_are_refused() -> None:
    with pytest.raises(MergeError, match="magnitudes of gradients cannot be negative, got -1"):
        merged(stats={name: {"w": -torch.ones(4)} for name in EXPERTS})
    base, experts = {"w": torch.zeros(2), "v": torch.zeros(2)}, {"a": {"w": torch.ones(2), "v": torch.ones(2)}}
    with pytest.raises(ValueError, match="trust_region needs gradients for every tensor, and v has none"):
        merge_state_dicts(base, experts, "trust_region", {}, {"a": {"w": torch.ones(2)}})


@pytest.mark.parametrize(
    ("given", "said"), [({"density": 0}, r"density is a share in \(0, 1\]"), ({"scope": "x"}, "scope")]
)
def test_parameters_out_of_range(given, said) -> None:
    with pytest.raises(ValueError, match=said):
        merged(**given)
