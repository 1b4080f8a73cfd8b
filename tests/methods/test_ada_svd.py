import math

import numpy as np
import pytest
import torch

from harness.merge import merge_state_dicts
from methods.ada_svd import leading

BASE = {"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2), "norm": torch.zeros(2)}
EXPERTS = {
    "a": {"fc.weight": torch.tensor([[3.0, 0, 0], [0, 0, 0]]), "fc.bias": torch.ones(2), "norm": torch.ones(2)},
    "b": {"fc.weight": torch.tensor([[0, 5.0, 0], [0, 0, 0]]), "fc.bias": -torch.ones(2), "norm": torch.ones(2)},
}


def merged(inputs: list[list[float]], **params) -> dict[str, torch.Tensor]:
    stats = {name: {"fc.weight": torch.tensor(inputs)} for name in EXPERTS}
    return merge_state_dicts(BASE, EXPERTS, "ada_svd", params, stats)


def test_by_hand() -> None:
    """The input lies 2 along the first expert's direction and 1 along the second's: shares e / (1 + e) and the rest."""
    result = merged([[2.0, 1.0, 7.0]], rank=1)
    share = math.e / (1 + math.e)
    torch.testing.assert_close(result["fc.weight"][0], torch.tensor([3 * share, 5 * (1 - share), 0]))
    torch.testing.assert_close(result["fc.bias"], torch.full((2,), 2 * share - 1))  # goes with its weight
    torch.testing.assert_close(result["norm"], torch.ones(2))  # averaged


def test_weights_are_averaged_over_inputs() -> None:
    result = merged([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]], rank=1)
    torch.testing.assert_close(result["fc.weight"][0], torch.tensor([1.5, 2.5, 0]))


def test_directions_that_a_change_has_not_do_not_count() -> None:
    first, more = merged([[2.0, 1.0, 7.0]], rank=1), merged([[2.0, 1.0, 7.0]], rank=3)
    torch.testing.assert_close(first["fc.weight"], more["fc.weight"])


def test_scale_and_the_rest() -> None:
    result = merged([[1.0, 1.0, 0.0]], rank=1, scale=2.0, average_rest=False)
    torch.testing.assert_close(result["fc.weight"][0], torch.tensor([3.0, 5.0, 0]))
    assert result["norm"].tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("rank", [1, 3, 10])
def test_leading_directions_are_those_of_an_svd(shape: tuple[int, int], rank: int) -> None:
    delta = np.random.default_rng(0).normal(size=shape)
    found = leading(torch.tensor(delta, dtype=torch.float32), rank).numpy()
    vectors = np.linalg.svd(delta)[2][: min(rank, *shape)].T
    np.testing.assert_allclose(found @ found.T, vectors @ vectors.T, atol=1e-6)


def test_no_change_has_no_directions() -> None:
    assert leading(torch.zeros(3, 4), 2).shape == (4, 0)


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fc.weight: inputs are \(s, in\) for a weight \(out, in\), got \(1, 2\)"):
        merged([[1.0, 2.0]])
