import pytest
import torch

from harness.merge import MergeError, merge_state_dicts
from methods.adamerging import AdamergingParams, AdamergingPlusParams, adamerging, adamerging_plus
from methods.kinds import Place, Stack
from tests.methods.stacks import SHAPES, assert_slopes, searched, stack, targets


def tiny(*deltas: list[float]) -> Stack:
    """One tensor, base zero."""
    vectors = torch.tensor(deltas)
    return Stack({"w": torch.zeros(vectors.shape[1:])}, {"w": vectors}, {"w": Place(1, 1, name="w")})


def test_first_step_by_hand() -> None:
    """Adam's first step is the learning rate against the gradient's sign."""
    own = tiny([1.0, 0.0], [0.0, 1.0])
    search = adamerging(own, AdamergingParams(steps=1, lr=0.01, scale=0.3))
    assert search.weight("w").tolist() == pytest.approx([0.3, 0.3])
    searched(search, {"w": torch.tensor([1.0, -1.0])})
    assert search.coefficients[0].tolist() == pytest.approx([0.31, 0.29])


def test_coefficients_reach_the_minimum() -> None:
    own = stack()
    wanted = targets(own)
    losses = searched(adamerging(own, AdamergingParams(steps=400, lr=0.02)), wanted)
    assert losses[-1] < 1e-3 < losses[0]


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [
        ("task", ["model"]),
        ("layer", ["layer 0", "layer 1", "layer 2", "layer 3"]),
        ("tensor", list(SHAPES)),
    ],
)
def test_what_is_pulled_is_the_slope_of_the_loss(granularity: str, groups: list[str]) -> None:
    own = stack()
    search = adamerging(own, AdamergingParams(granularity))
    assert search.groups == groups
    assert search.coefficients.shape == (len(groups), 3)
    assert_slopes(search, targets(own), ["coefficients"])


def test_merged_weights_are_task_arithmetics() -> None:
    own = stack()
    search = adamerging(own, AdamergingParams(scale=0.3))
    experts = {str(index): {name: own.base[name] + own.deltas[name][index] for name in SHAPES} for index in range(3)}
    merged = merge_state_dicts(own.base, experts, "task_arithmetic", {"scale": 0.3})
    for name in SHAPES:
        torch.testing.assert_close(search.weight(name), merged[name])


def test_copies_of_one_expert_whose_coefficients_sum_to_one_are_that_expert() -> None:
    own = stack(1)
    copies = Stack(
        own.base, {name: deltas.expand(3, *deltas.shape[1:]) for name, deltas in own.deltas.items()}, own.places
    )
    search = adamerging(copies, AdamergingParams(scale=1 / 3))
    for name in SHAPES:
        torch.testing.assert_close(search.weight(name), own.base[name] + own.deltas[name][0])


def test_clamped() -> None:
    own, wanted = tiny([1.0, 0.0], [0.0, 1.0]), {"w": torch.tensor([0.5, -0.5])}
    free = adamerging(own, AdamergingParams(steps=200, lr=0.02))
    held = adamerging(own, AdamergingParams(steps=200, lr=0.02, clamp=True))
    searched(free, wanted)
    searched(held, wanted)
    assert free.coefficients[0].tolist() == pytest.approx([0.5, -0.5], abs=1e-2)
    assert held.coefficients[0].tolist() == pytest.approx([0.5, 0.0], abs=1e-2)


def test_plus_by_hand() -> None:
    """Half of each is kept; where signs differ, the heavier one's is elected and the other says nothing."""
    own = tiny([4.0, -3.0, 0.1, 0.2], [-1.0, 2.0, 0.0, 0.1])
    search = adamerging_plus(own, AdamergingPlusParams(density=0.5))
    assert own.deltas["w"].tolist() == [[4.0, -3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(search.weight("w"), torch.tensor([1.2, -0.9, 0.0, 0.0]))


def test_plus_with_equal_coefficients_is_ties_with_the_sum() -> None:
    own = stack()
    experts = {str(index): {name: own.base[name] + own.deltas[name][index] for name in SHAPES} for index in range(3)}
    merged = merge_state_dicts(own.base, experts, "ties", {"density": 0.4, "scale": 0.3, "disjoint": "sum"})
    search = adamerging_plus(own, AdamergingPlusParams(density=0.4))
    for name in SHAPES:
        torch.testing.assert_close(search.weight(name), merged[name])


def test_it_is_no_method_for_state_dicts() -> None:
    with pytest.raises(MergeError, match=r"adamerging needs models and data.*crucible run method=adamerging"):
        merge_state_dicts({"w": torch.ones(1)}, {"a": {"w": torch.ones(1)}}, "adamerging")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"granularity": "block"}, "granularity is one of tensor, layer, task; got 'block'"),
        ({"loss": "nothing"}, "loss is one of entropy, labels"),
        ({"conflicts": "fight"}, "conflicts is one of sum, mgda"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("inf")}, "lr must be a finite number"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"scale": float("nan")}, "scale must be a finite number"),
    ],
)
def test_params_are_checked(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamergingParams(**params)
