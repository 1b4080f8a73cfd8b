import copy

import numpy as np
import pytest
import torch

from methods.pwe_moe import PweMoeParams, best_mixture, exact_weights, pwe_moe
from tests.methods.test_we_moe import INPUTS, Model, Roles, models


def built(base: Model, experts: list[Model], **params) -> Model:
    return pwe_moe(copy.deepcopy(base), experts, PweMoeParams(**params), Roles())


def test_the_preference_says_what_the_model_answers() -> None:
    base, experts = models()
    module = built(base, experts)
    for layer in module.block.mlp.router.net[::2]:
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    even = module(INPUTS)
    module.preference.set_to([2.0, 1.0, 1.0])
    assert module.preference.shares.tolist() == [0.5, 0.25, 0.25]
    assert not torch.allclose(module(INPUTS), even)
    module.preference.set_to(None)
    torch.testing.assert_close(module(INPUTS), even)
    torch.testing.assert_close(module(INPUTS)[1:2], module(INPUTS[1:2]))
    module.preference.ask([2.0, 1.0, 1.0])
    assert not torch.allclose(module(INPUTS), even)
    module.preference.ask(None)
    torch.testing.assert_close(module(INPUTS), even)
    kept = built(base, experts, preference=[2.0, 1.0, 1.0])
    assert kept.state_dict()["preference.shares"].tolist() == [0.5, 0.25, 0.25]


def test_scalarization_weighs_by_the_preference_that_was_drawn() -> None:
    base, experts = models()
    module = built(base, experts)
    module.lesson.begin(module, torch.Generator().manual_seed(5))
    drawn = module.preference.shares.clone()
    assert float(drawn.sum()) == pytest.approx(1)
    assert torch.equal(module.lesson.weigh(torch.ones(3), torch.ones(3, 4)), drawn)
    module.lesson.begin(module, torch.Generator().manual_seed(5))
    assert torch.equal(module.preference.shares, drawn)
    module.lesson.finish(module)
    torch.testing.assert_close(module.preference.shares, torch.full((3,), 1 / 3))


@pytest.mark.parametrize("seed", range(20))
def test_the_best_mixture_is_no_worse_than_any_that_is_allowed(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n, m = int(generator.integers(2, 5)), int(generator.integers(0, 4))
    gains, rows, least = generator.normal(size=n), generator.normal(size=(m, n)), generator.normal(size=m) - 0.5
    found = best_mixture(gains, rows, least)
    tried = generator.dirichlet(np.full(n, 0.5), size=20000)
    allowed = tried[(tried @ rows.T >= least).all(1)] if m else tried
    if found is None:
        assert not len(allowed)
        return
    assert found.min() >= -1e-9
    assert found.sum() == pytest.approx(1)
    assert (rows @ found >= least - 1e-8).all()
    assert not len(allowed) or gains @ found >= (allowed @ gains).max() - 1e-9


def descended(preference: list[float], steps: int = 1000) -> np.ndarray:
    """Losses |x - a|^2 and |x - b|^2 after steps along the exact method's direction."""
    centres = np.array([[1.0, 0.0], [-1.0, 0.0]])
    x = np.array([0.9, 1.0])
    for _ in range(steps):
        losses, slopes = ((x - centres) ** 2).sum(1), 2 * (x - centres)
        x = x - 0.01 * exact_weights(losses, slopes @ slopes.T, np.array(preference)) @ slopes
    return ((x - centres) ** 2).sum(1)


@pytest.mark.parametrize("first", [0.2, 0.5, 0.7])
def test_the_exact_method_ends_on_the_front_where_the_preference_points(first: float) -> None:
    """The front is sqrt(loss 1) + sqrt(loss 2) = 2; r_1 loss_1 = r_2 loss_2 there."""
    losses = descended([first, 1 - first])
    assert np.sqrt(losses).sum() == pytest.approx(2, abs=0.02)
    assert first * losses[0] == pytest.approx((1 - first) * losses[1], rel=0.05)


def test_preferences_are_checked() -> None:
    base, experts = models()
    with pytest.raises(ValueError, match="a preference is 3 numbers of at least 0, one for each expert"):
        built(base, experts, preference=[1.0, 2.0])
    for wrong in ([-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="preference has numbers of at least 0, some above"):
            PweMoeParams(preference=wrong)
    with pytest.raises(ValueError, match="by is one of scalarization, epo"):
        PweMoeParams(by="sum")
