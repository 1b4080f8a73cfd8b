import pytest
import torch

from methods.kinds import Place, Stack
from methods.sau import SauParams, sau
from tests.methods.stacks import SHAPES, assert_slopes, searched, stack, targets


def test_first_step_by_hand() -> None:
    """Every weight moves by lr towards what lowers the loss."""
    own = Stack({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([[1.0, 2.0], [3.0, -4.0]])}, {"w": Place()})
    search = sau(own, SauParams(scale=0.5, lr=0.01, steps=1))
    assert search.weight("w").tolist() == [3.0, -1.0]
    searched(search, {"w": torch.tensor([0.0, 0.0])})
    assert search.weight("w").tolist() == pytest.approx([2.99, -0.99])


def test_what_is_pulled_is_the_slope_and_weights_reach_the_minimum() -> None:
    own = stack()
    wanted = targets(own)
    search = sau(own, SauParams(steps=400, lr=0.02))
    assert_slopes(search, wanted, [f"weight/{name}" for name in SHAPES])
    assert searched(search, wanted)[-1] < 1e-3


def test_copies_of_one_expert_start_as_that_expert_and_a_weight_handed_out_is_a_copy() -> None:
    own = stack(1)
    expert = {name: own.base[name] + own.deltas[name][0] for name in SHAPES}
    copies = {name: deltas.expand(4, *deltas.shape[1:]).clone() for name, deltas in own.deltas.items()}
    search = sau(Stack(own.base, copies, own.places), SauParams(scale=0.25))
    for name in SHAPES:
        torch.testing.assert_close(search.weight(name), expert[name])
        search.weight(name).zero_()
        torch.testing.assert_close(search.weight(name), expert[name])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"fooling": -0.1}, "fooling must be at least 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"adv_weight": -1.0}, "adv_weight must be at least 0"),
    ],
)
def test_params_are_checked(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SauParams(**params)
