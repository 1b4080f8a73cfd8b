import pytest
import torch

from harness.merge import merge_state_dicts
from methods.della import DellaLinearParams, DellaParams, della

BASE = torch.ones(2, 3)
DELTA = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.25, 0.75]])  # ranks (0, 1, 1/2) and (1/2, 0, 1)
CHANCES = torch.tensor([[0.25, 0.75, 0.5], [0.5, 0.25, 0.75]])


def linear(uniform: torch.Tensor, **params) -> torch.Tensor:
    """The merged change of one expert."""
    given = DellaLinearParams(density=0.5, epsilon=0.25, scale=1.0, **params)
    return della(BASE, (BASE + DELTA)[None], given, draw=lambda index: uniform) - BASE


def test_the_probability_of_keeping_follows_the_rank_in_the_row() -> None:
    """A number just below an entry's probability keeps it, one at it drops it; what is kept is divided by it."""
    torch.testing.assert_close(linear(CHANCES - 0.01), DELTA / CHANCES)
    assert not linear(CHANCES).any()
    mixed = torch.where(torch.tensor([[True, False, True], [False, True, True]]), CHANCES - 0.01, CHANCES)
    assert linear(mixed, rescale="none").tolist() == [[1.0, 0.0, 2.0], [0.0, 0.25, 0.75]]
    by_norm = linear(mixed, rescale="l1")
    torch.testing.assert_close(by_norm.abs().sum(), DELTA.abs().sum())
    torch.testing.assert_close(by_norm / linear(mixed, rescale="none").clamp(min=1e-9), by_norm.sign() * 7.5 / 4)


def test_the_mean_is_kept() -> None:
    delta = torch.rand(200, 100) + 0.5
    merged = merge_state_dicts(
        {"w": torch.zeros(200, 100)}, {"a": {"w": delta}}, "della_linear", {"scale": 1.0, "density": 0.6}
    )["w"]
    assert abs(float((merged != 0).float().mean()) - 0.6) < 0.02
    assert abs(float(merged.mean() / delta.mean()) - 1) < 0.03
    larger = delta > delta.median(1, keepdim=True).values
    assert (merged[larger] != 0).float().mean() > 0.65 > 0.55 > (merged[~larger] != 0).float().mean()


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (1, 4), (0, 3), (3, 0), (2, 3, 2, 2)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    """A row of one entry is kept with the density itself."""
    base, experts = torch.zeros(shape), torch.ones(1, *shape)
    for uniform, value in ((0.0, 1.0), (0.999, 0.0)):
        params = DellaLinearParams(density=0.5, epsilon=0.2, scale=1.0, rescale="none")
        numbers = [torch.full(shape, uniform)]
        merged = della(base, experts, params, draw=numbers.__getitem__)
        assert torch.equal(merged, torch.full(shape, value))


def test_signs_are_elected_among_what_is_left() -> None:
    experts = torch.tensor([[1.0], [-3.0], [2.0]])
    numbers = [0.0, 0.9, 0.0]  # the second is dropped
    params = DellaParams(density=0.5, epsilon=0.0, rescale="none")
    merged = della(torch.zeros(1), experts, params, draw=lambda index: torch.tensor([numbers[index]]))
    assert merged.tolist() == [1.5]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"in \(0, 1\], got density 0\.2 and epsilon 0\.3"):
        DellaParams(density=0.2, epsilon=0.3)
    with pytest.raises(ValueError, match=r"got density 0\.9 and epsilon 0\.15"):
        DellaParams(densities=[1.0, 0.9])
    with pytest.raises(ValueError, match="base_rule is one of linear; got 'ties'"):
        DellaLinearParams(base_rule="ties")
