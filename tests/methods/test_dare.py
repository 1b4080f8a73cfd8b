import math

import pytest
import torch

from harness.merge import merge_state_dicts
from methods.dare import DareParams, DareTiesParams, dare
from methods.draws import drawer

N = 40_000


def merged(deltas: dict[str, torch.Tensor], seed: int = 0, **params) -> torch.Tensor:
    """The merged change."""
    size = len(next(iter(deltas.values())))
    experts = {name: {"w": delta} for name, delta in deltas.items()}
    return merge_state_dicts({"w": torch.zeros(size)}, experts, "dare", params, seed=seed)["w"]


def test_by_hand() -> None:
    """Numbers below the density keep an entry; what is kept is divided by the density."""
    numbers = {0: torch.tensor([0.1, 0.9, 0.49]), 1: torch.tensor([0.5, 0.2, 0.99])}
    base = torch.tensor([1.0, 1.0, 1.0])
    experts = torch.tensor([[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]])  # changes (1, 2, 3) and (4, 5, 6)
    params = DareParams(density=0.5, scale=1.0)
    assert dare(base, experts, params, numbers=None, draw=numbers.__getitem__).tolist() == [3.0, 11.0, 7.0]
    params = DareParams(density=0.5, scale=1.0, rescale="none")
    assert dare(base, experts, params, numbers=None, draw=numbers.__getitem__).tolist() == [2.0, 6.0, 4.0]


def test_the_share_and_the_mean_are_kept() -> None:
    change = merged({"a": torch.ones(N)}, density=0.3, scale=1.0)
    assert set(change.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.3)}
    deviation = math.sqrt(0.3 * 0.7 / N)
    assert abs(float((change != 0).float().mean()) - 0.3) < 4 * deviation
    assert abs(float(change.mean()) - 1.0) < 4 * deviation / 0.3


def test_experts_and_tensors_are_dropped_independently() -> None:
    both = {"w": torch.ones(N), "v": torch.ones(N)}
    base = {name: torch.zeros(N) for name in both}
    params = {"density": 0.5, "scale": 1.0, "rescale": "none"}
    one = merge_state_dicts(base, {"a": both}, "dare", params)
    other = merge_state_dicts(base, {"b": both}, "dare", params)
    for first, second in ((one["w"], one["v"]), (one["w"], other["w"])):
        assert abs(float((first * second).mean()) - 0.25) < 0.02


def test_the_mask_is_the_experts_whoever_else_is_merged() -> None:
    """It depends on seed, tensor and expert alone."""
    alone = merged({"a": torch.ones(64)}, scale=1.0)
    with_b = merged({"b": torch.zeros(64), "a": torch.ones(64)}, scale=1.0)
    assert torch.equal(alone, with_b)


def test_density_one_is_task_arithmetic() -> None:
    deltas = {"a": torch.randn(9), "b": torch.randn(9)}
    experts = {name: {"w": delta} for name, delta in deltas.items()}
    plain = merge_state_dicts({"w": torch.zeros(9)}, experts, "task_arithmetic", {"scale": 0.4})["w"]
    assert torch.equal(merged(deltas, density=1.0, scale=0.4), plain)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_base_rule_ties_is_ties_of_what_is_left(scope: str) -> None:
    """The same masks applied by hand to the experts, then `ties`."""
    generator = torch.Generator().manual_seed(1)
    deltas = {name: torch.randn(101, generator=generator) for name in ("a", "b", "c")}
    draw = drawer(5, "w", tuple(deltas), (101,), 0, torch.device("cpu"))
    left = {name: {"w": delta * (draw(index) < 0.6) / 0.6} for index, (name, delta) in enumerate(deltas.items())}
    ties = {"density": 0.3, "scale": 0.5, "disjoint": "sum", "scope": scope}
    expected = merge_state_dicts({"w": torch.zeros(101)}, left, "ties", ties)["w"]
    params = {"density": 0.6, "scale": 0.5, "base_rule": "ties", "trim": 0.3, "disjoint": "sum", "scope": scope}
    torch.testing.assert_close(merged(deltas, seed=5, **params), expected)


def test_weights_and_densities_of_each_expert_by_hand() -> None:
    numbers = {0: torch.tensor([0.1, 0.9, 0.49]), 1: torch.tensor([0.5, 0.2, 0.99])}
    base = torch.tensor([1.0, 1.0, 1.0])
    experts = torch.tensor([[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]])  # changes (1, 2, 3) and (4, 5, 6)
    params = DareParams(densities=[0.5, 1.0], scale=1.0, weights=[2.0, 0.5])
    assert dare(base, experts, params, numbers=None, draw=numbers.__getitem__).tolist() == [7.0, 3.5, 16.0]
    params = DareParams(densities=[0.5, 1.0], scale=1.0, weights=[2.0, -0.5], base_rule="ties", trim=1, disjoint="sum")
    assert dare(base, experts, params, numbers=None, draw=numbers.__getitem__).tolist() == [5.0, -1.5, 13.0]
    params = DareParams(densities=[0.5, 1.0, 1.0])
    with pytest.raises(ValueError, match="densities lists 3 numbers for 2 experts"):
        dare(base, experts, params, numbers=None, draw=numbers.__getitem__)


@pytest.mark.parametrize("field", ["density", "trim"])
def test_shares_are_checked(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} is a share in \(0, 1\], got 20"):
        DareParams(**{field: 20})


def test_norms_given_back_over_a_tensor_or_the_model() -> None:
    change = {"v": torch.arange(1.0, 33.0), "w": torch.full((8,), 100.0)}
    base = {name: torch.zeros_like(tensor) for name, tensor in change.items()}
    params = {"density": 0.5, "scale": 1.0, "rescale": "l1"}
    found = merge_state_dicts(base, {"a": change}, "dare", {**params, "scope": "tensor"})
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.sum(), change[name].sum())
    found = merge_state_dicts(base, {"a": change}, "dare", {**params, "scope": "model"})
    assert abs(float(found["v"].sum() / change["v"].sum()) - 1) > 1e-3
    torch.testing.assert_close(found["v"].sum() + found["w"].sum(), change["v"].sum() + change["w"].sum())


def test_dare_ties_is_dare_with_ties() -> None:
    deltas = {"a": torch.randn(50), "b": torch.randn(50)}
    experts = {name: {"w": delta} for name, delta in deltas.items()}
    base = {"w": torch.zeros(50)}
    one = merge_state_dicts(base, experts, "dare_ties", {"density": 0.7})
    other = merge_state_dicts(base, experts, "dare", {"density": 0.7, "base_rule": "ties", "scale": 1.0})
    assert torch.equal(one["w"], other["w"])
    with pytest.raises(ValueError, match="base_rule is one of ties"):
        DareTiesParams(base_rule="linear")
    with pytest.raises(ValueError, match="rescale is one of share, l1, none"):
        DareParams(rescale="true")
