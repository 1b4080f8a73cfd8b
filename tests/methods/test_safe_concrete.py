import pytest
import torch

from methods.concrete import ConcreteAdamergingParams, concrete_adamerging, concrete_task_arithmetic
from methods.safe_concrete import (
    SafeConcreteAdamergingParams,
    SafeConcreteTaskArithmeticParams,
    safe_concrete_adamerging,
    safe_concrete_task_arithmetic,
)
from tests.methods.stacks import SHAPES, searched, stack, targets


@pytest.mark.parametrize(
    ("safe", "plain", "params"),
    [
        (safe_concrete_task_arithmetic, concrete_task_arithmetic, SafeConcreteTaskArithmeticParams(steps=5)),
        (safe_concrete_adamerging, concrete_adamerging, SafeConcreteAdamergingParams(steps=4, adamerging_steps=3)),
    ],
)
def test_under_one_loss_it_is_the_same_search_to_the_bit(safe, plain, params) -> None:
    """What makes it safe is the loss alone."""
    wanted = targets(stack())
    one, other = safe(stack(), params), plain(stack(), params)
    assert searched(one, wanted) == searched(other, wanted)
    assert all(torch.equal(one.weight(name), other.weight(name)) for name in SHAPES)


def test_defaults_are_those_of_the_plain_mask() -> None:
    safe, plain = SafeConcreteAdamergingParams(), ConcreteAdamergingParams()
    assert all(getattr(safe, name) == value for name, value in vars(plain).items())


@pytest.mark.parametrize("made", [SafeConcreteTaskArithmeticParams, SafeConcreteAdamergingParams])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"adv_weight": -0.1}, "adv_weight must be at least 0"),
        ({"adv_steps": 0}, "adv_steps must be at least 1"),
        ({"trigger_norm": 0.0}, "trigger_norm must be positive"),
        ({"penalty": "labels"}, "penalty is one of entropy, agreement"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_params_are_checked(made, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**params)
