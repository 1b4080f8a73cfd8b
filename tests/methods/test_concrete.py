import pytest
import torch

from harness.merge import merge_state_dicts
from methods.concrete import (
    ConcreteAdamergingParams,
    ConcreteTaskArithmeticParams,
    ConcreteTsvMParams,
    concrete_adamerging,
    concrete_task_arithmetic,
    concrete_tsv_m,
)
from methods.kinds import Place, Stack
from tests.methods.stacks import SHAPES, assert_slopes, loss_of, pulled, searched, stack, targets

MASKS = [f"mask/{name}" for name in SHAPES]


def experts_of(own: Stack) -> dict[str, dict[str, torch.Tensor]]:
    return {
        str(index): {name: own.base[name] + own.deltas[name][index] for name in SHAPES}
        for index in range(own.n_experts)
    }


def test_by_hand() -> None:
    """Logits ln 3 and -ln 3 at temperature 1: shares 3/4 and 1/4, their mean 1/2: the changes 1.5 and 0.5 times."""
    own = Stack({"w": torch.zeros(2)}, {"w": torch.tensor([[1.0, 2.0], [1.0, 2.0]])}, {"w": Place()})
    search = concrete_task_arithmetic(own, ConcreteTaskArithmeticParams(scale=0.5, temperature=1.0))
    search.logits["w"].copy_(torch.tensor([3.0, 1 / 3]).log())
    search.finish()
    assert search.weight("w").tolist() == pytest.approx([1.5, 1.0])
    search.params = ConcreteTaskArithmeticParams(scale=0.5, mask="hard")
    search.finish()
    assert search.weight("w").tolist() == pytest.approx([2.0, 0.0])  # one of two is kept, and doubled
    search.logits["w"].fill_(-1)
    search.finish()
    assert search.weight("w").tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("made", "params", "method", "given"),
    [
        (concrete_task_arithmetic, ConcreteTaskArithmeticParams(), "task_arithmetic", {"scale": 0.3}),
        (concrete_tsv_m, ConcreteTsvMParams(scale=0.7), "tsv_m", {"scale": 0.7}),
        (concrete_adamerging, ConcreteAdamergingParams(), "task_arithmetic", {"scale": 0.3}),
    ],
)
def test_a_mask_that_has_learnt_nothing_is_the_merge_below(made, params, method, given) -> None:
    own = stack()
    merged = merge_state_dicts(own.base, experts_of(own), method, given)
    search = made(own, params)
    search.finish()
    for name in SHAPES:
        torch.testing.assert_close(search.weight(name), merged[name], atol=2e-5, rtol=1e-4)


def test_what_is_pulled_is_the_slope_of_the_loss() -> None:
    own = stack()
    wanted = targets(own)
    search = concrete_task_arithmetic(own, ConcreteTaskArithmeticParams(temperature=1.0))
    search.redraw = lambda: search.begin(3, lambda: 0.0)
    search.redraw()
    assert_slopes(search, wanted, MASKS)


def test_of_coefficients_too_behind_a_mask() -> None:
    own = stack()
    wanted = targets(own)
    search = concrete_adamerging(own, ConcreteAdamergingParams(steps=2, adamerging_steps=2))
    for name, logits in search.logits.items():
        logits.copy_(torch.linspace(-1, 1, max(logits.numel(), 1)).reshape(SHAPES[name]))
    search.begin(2, lambda: 0.0)
    assert_slopes(search, wanted, ["coefficients"])
    assert all(search.learnt[name].grad is None for name in MASKS)


def test_the_inner_step_goes_down_from_where_coefficients_start() -> None:
    own = stack()
    wanted = targets(own)
    search = concrete_adamerging(own, ConcreteAdamergingParams(inner_lr=0.5, granularity="task"))
    search.begin(0, lambda: pulled(search, wanted))
    assert search.learnt["coefficients"].grad is not None  # of the look
    moved = search.coefficients.clone()
    after = float(loss_of({name: search.weight(name) for name in wanted}, wanted))
    search.coefficients.fill_(0.3)
    before = float(loss_of({name: search.weight(name) for name in wanted}, wanted))
    assert after < before
    search.begin(1, lambda: pulled(search, wanted))
    assert not torch.equal(search.coefficients, moved)  # another mask
    assert float((search.coefficients - 0.3).abs().max()) < 0.5  # from the start again


@pytest.mark.parametrize(
    ("made", "params"),
    [
        (concrete_task_arithmetic, ConcreteTaskArithmeticParams(steps=150, lr=0.05)),
        (concrete_tsv_m, ConcreteTsvMParams(steps=150, lr=0.05)),
        (concrete_adamerging, ConcreteAdamergingParams(steps=60, lr=0.05, adamerging_steps=100, adamerging_lr=0.02)),
    ],
)
def test_what_is_learnt_lowers_the_loss_and_equal_seeds_are_equal(made, params) -> None:
    wanted = targets(stack())
    start = made(stack(), params)
    start.finish()
    before = float(loss_of({name: start.weight(name) for name in wanted}, wanted))
    search, again = made(stack(), params), made(stack(), params)
    assert searched(search, wanted)[-1] < 0.95 * before
    searched(again, wanted)
    for name in SHAPES:
        assert torch.equal(search.weight(name), again.weight(name))


def test_masks_differ_by_step_and_seed_and_by_nothing_else() -> None:
    search = concrete_task_arithmetic(stack(), ConcreteTaskArithmeticParams())
    drawn = []
    for step in (0, 1, 0):
        search.begin(step, lambda: 0.0)
        drawn.append(search.raw["layers.0.q"].clone())
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    search.seed += 1
    search.begin(0, lambda: 0.0)
    assert not torch.equal(drawn[0], search.raw["layers.0.q"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"mask": "sharp"}, "mask is one of soft, hard"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"inner_lr": -1.0}, "inner_lr must be at least 0"),
        ({"adamerging_lr": 0.0}, "adamerging_lr must be positive"),
        ({"adamerging_steps": -1}, "adamerging_steps must be at least 0"),
        ({"granularity": "block"}, "granularity is one of"),
    ],
)
def test_params_are_checked(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConcreteAdamergingParams(**params)
