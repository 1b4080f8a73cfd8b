import pytest
import torch

from methods.awm import AwmParams, awm
from methods.kinds import Place, Stack
from tests.methods.stacks import SHAPES, assert_slopes, searched, stack, targets

MASKS = ["mask/layers.0.q", "mask/layers.1.q"]


def tiny(**params) -> tuple[Stack, AwmParams]:
    """One linear layer that merges to (2, -1), and a bias that merges to 3."""
    own = Stack(
        {"w": torch.zeros(1, 2), "b": torch.tensor([1.0])},
        {"w": torch.tensor([[[2.0, 0.0]], [[2.0, -2.0]]]), "b": torch.tensor([[2.0], [2.0]])},
        {"w": Place(1, 1, linear=True), "b": Place(1, 1)},
    )
    return own, AwmParams(scale=0.5, **params)


def test_by_hand() -> None:
    """Adam's first step is lr against the slope's sign: what should be larger stays at a mask of 1."""
    search = awm(*tiny(lr=0.1, steps=1))
    assert search.weight("w").tolist() == [[2.0, -1.0]]
    assert search.weight("b").tolist() == [3.0]
    searched(search, {"w": torch.tensor([[5.0, 1.0]]), "b": torch.tensor([0.0])})
    assert search.masks["w"].tolist() == [[1.0, pytest.approx(0.9)]]
    assert search.weight("w")[0].tolist() == pytest.approx([2.0, -0.9])
    assert search.weight("b").tolist() == [3.0]  # no linear layer's weight


def test_sparsity_pulls_every_mask_down() -> None:
    search = awm(*tiny(lr=0.1, steps=3, sparsity=0.5))
    for _ in range(3):
        search.settle()
    assert search.masks["w"][0].tolist() == pytest.approx([0.85, 0.85])
    for _ in range(40):
        search.settle()
    assert search.masks["w"][0].tolist() == [0.0, 0.0]  # and not below


def test_what_is_pulled_is_the_slope_of_the_loss() -> None:
    own = stack()
    wanted = targets(own)
    search = awm(own, AwmParams())
    for mask in search.masks.values():
        mask.fill_(0.6)
    assert_slopes(search, wanted, MASKS)


def test_what_is_learnt_lowers_the_loss_within_the_bounds_of_a_mask() -> None:
    own = stack()
    wanted = targets(own)
    search = awm(own, AwmParams(steps=100, lr=0.05))
    losses = searched(search, wanted)
    assert losses[-1] < losses[0]
    assert all(0 <= float(mask.min()) <= float(mask.max()) <= 1 for mask in search.masks.values())


def test_copies_of_one_expert_start_as_that_expert() -> None:
    own = stack(1)
    expert = {name: own.base[name] + own.deltas[name][0] for name in SHAPES}
    copies = {name: deltas.expand(4, *deltas.shape[1:]).clone() for name, deltas in own.deltas.items()}
    search = awm(Stack(own.base, copies, own.places), AwmParams(scale=0.25))
    for name in SHAPES:
        torch.testing.assert_close(search.weight(name), expert[name])


def test_layers_stored_the_other_way_are_masked_and_a_model_without_any_is_refused() -> None:
    own, params = tiny()
    turned = Stack(own.base, dict(own.deltas), {**own.places, "w": Place(1, 1, transposed=True)})
    assert list(awm(turned, params).learnt) == ["mask/w"]
    own, params = tiny()
    with pytest.raises(ValueError, match="awm masks the weights of linear layers, and none"):
        awm(Stack(own.base, own.deltas, {"w": Place(), "b": Place()}), params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"adv_weight": -0.1}, "adv_weight must be at least 0"),
        ({"adv_steps": 0}, "adv_steps must be at least 1"),
        ({"trigger_norm": 0.0}, "trigger_norm must be positive"),
        ({"sparsity": -1.0}, "sparsity must be at least 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"loss": "both"}, "loss is one of labels, entropy"),
    ],
)
def test_params_are_checked(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AwmParams(**params)
