import math
from typing import Any

import pytest
import torch

from methods.dop import Dop, DopParams
from tests.methods.samples import SampleRoles

NAME = "layers.0.fc1.weight"
State = dict[str, torch.Tensor]


def folded(base: State, *experts: State, **params) -> State:
    fold = Dop(base, DopParams(**params), SampleRoles())
    for expert in experts:
        fold.update(expert)
    return fold.result()


def random(n_experts: int, *shape: int, seed: int = 0) -> tuple[State, list[State]]:
    base, *changes = torch.randn((1 + n_experts, *shape), generator=torch.Generator().manual_seed(seed))
    return {NAME: base}, [{NAME: base + 0.1 * change} for change in changes]


def test_directions_are_those_whose_share_stays_below() -> None:
    """One direction alone has the whole sum, which is not below 1: nothing is projected on, and the mean stays."""
    base = {NAME: torch.zeros(2, 2)}
    first, second = {NAME: torch.diag(torch.tensor([2.0, 0.0]))}, {NAME: torch.diag(torch.tensor([0.0, 4.0]))}
    found = folded(base, first, second, steps=5, svd_epsilon=1.0)[NAME]
    assert torch.equal(found, torch.diag(torch.tensor([1.0, 2.0])))


def test_one_step_by_hand() -> None:
    """Rank one is kept of diag(2, 1) and of diag(1, 3): the first projects on the first axis with weight 4, the second
    on the second with weight 9. From the mean (1.5, 2) Adam's first step is lr towards 2 and towards 3."""
    base = {NAME: torch.zeros(2, 2)}
    first, second = {NAME: torch.diag(torch.tensor([2.0, 1.0]))}, {NAME: torch.diag(torch.tensor([1.0, 3.0]))}
    found = folded(base, first, second, steps=1, lr=0.01, mgda=False, svd_epsilon=0.9)[NAME]
    torch.testing.assert_close(found, torch.diag(torch.tensor([1.51, 2.01])))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_is_whose_model_it_becomes(alpha: float) -> None:
    base, experts = random(2, 6, 4)
    found = folded(base, *experts, steps=600, lr=1e-3, mgda=False, alpha=alpha, svd_epsilon=0.99999)[NAME]
    kept, other = (experts[0], experts[1]) if alpha else (experts[1], experts[0])
    assert float((found - kept[NAME]).norm()) < 0.3 * float((found - other[NAME]).norm())


@pytest.mark.parametrize("space", ["u", "v", "uv"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_balanced_losses_are_lower_than_at_the_mean(space: str, ema: float) -> None:
    """The min-norm combination lowers both, measured with a full decomposition."""
    base, experts = random(2, 6, 5)

    def losses(x: torch.Tensor) -> list[float]:
        found = []
        for expert in experts:
            u, s, vh = torch.linalg.svd(expert[NAME] - base[NAME], full_matrices=False)
            away = x - expert[NAME]
            by_outputs = (s[:, None] * (u.T @ away)).square().sum()
            by_inputs = ((away @ vh.T) * s).square().sum()
            found.append(float(by_outputs * ("u" in space) + by_inputs * ("v" in space)))
        return found

    given: dict[str, Any] = {"space": space, "ema": ema, "alpha": 0.5, "lr": 1e-4}
    before, after = (losses(folded(base, *experts, steps=n, **given)[NAME]) for n in (0, 40))
    assert sum(math.log(late / early) for late, early in zip(after, before, strict=True)) < 0


def test_copies_of_an_expert_are_that_expert() -> None:
    base, experts = random(1, 5, 5)
    assert torch.equal(folded(base, *experts * 3, steps=5)[NAME], experts[0][NAME])


def test_a_layer_that_was_not_trained_does_not_move() -> None:
    base, experts = random(1, 5, 5)
    assert torch.equal(folded(base, base, base, steps=5)[NAME], base[NAME])
    found = folded(base, base, experts[0], steps=5, mgda=False, alpha=0.0)[NAME]
    assert bool(torch.isfinite(found).all())


def test_what_is_no_linear_layer_counts_each_expert_once() -> None:
    values = [1.0, 2.0, 6.0]
    found = folded({"bias": torch.zeros(1)}, *({"bias": torch.tensor([value])} for value in values))
    torch.testing.assert_close(found["bias"], torch.tensor([3.0]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("steps", -1), ("alpha", 1.5), ("ema", 1.0), ("svd_epsilon", 99.9), ("space", "vu")],
)
def test_bad_parameters(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        DopParams(**{name: value})
