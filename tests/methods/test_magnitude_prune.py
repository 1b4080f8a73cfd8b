import pytest
import torch

from methods.magnitude_prune import MagnitudePruneParams, magnitude_prune

BASE = torch.ones(2, 4)
DELTA = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.1, 0.2, 0.3, 0.4]])


def change(**params) -> list[list[float]]:
    merged = magnitude_prune(torch.zeros(2, 4), DELTA[None], MagnitudePruneParams(**params))
    return [[round(value, 5) for value in row] for row in merged.tolist()]


def test_the_share_of_each_row_or_of_the_tensor() -> None:
    assert change(density=0.5) == [[0, 0, 3.0, -4.0], [0, 0, 0.3, 0.4]]
    assert change(density=0.5, scope="tensor") == [[1.0, -2.0, 3.0, -4.0], [0, 0, 0, 0]]
    assert change(density=0.25, prune="major") == [[1.0, 0, 0, 0], [0.1, 0, 0, 0]]
    assert change(density=0.01) == [[0, 0, 0, -4.0], [0, 0, 0, 0.4]]


def test_rescaled_by_the_share_or_the_norm() -> None:
    assert change(density=0.5, rescale="share") == [[0, 0, 6.0, -8.0], [0, 0, 0.6, 0.8]]
    assert change(density=0.4, rescale="share") == [[0, 0, 0, -16.0], [0, 0, 0, 1.6]]  # a quarter is kept
    assert change(density=0.5, scope="tensor", rescale="l1") == [[1.1, -2.2, 3.3, -4.4], [0, 0, 0, 0]]


def test_of_the_weights() -> None:
    """Zeros stay zeros; scale goes from the base to the pruned expert."""
    expert = torch.tensor([[5.0, -2.0, 3.0, -4.0]])
    params = MagnitudePruneParams(of="weights")
    assert magnitude_prune(BASE[:1], expert[None], params).tolist() == [[5.0, 0, 0, -4.0]]
    half = MagnitudePruneParams(of="weights", scale=0.5)
    assert magnitude_prune(BASE[:1], expert[None], half).tolist() == [[3.0, 0.5, 0.5, -1.5]]


def test_several_experts_are_summed() -> None:
    experts = torch.stack([BASE + DELTA, BASE - DELTA])
    params = MagnitudePruneParams(density=0.25, weights=[1.0, 0.5], scale=2.0)
    assert magnitude_prune(BASE, experts, params)[0].tolist() == [1.0, 1.0, 1.0, -3.0]


@pytest.mark.parametrize(
    "params", [{"of": "bias"}, {"prune": "all"}, {"scope": "model"}, {"rescale": "l2"}, {"density": 20}]
)
def test_bad_input(params: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        MagnitudePruneParams(**params)
