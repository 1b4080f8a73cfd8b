import numpy as np
import pytest
import torch

from harness.merge import MergeError, merge_state_dicts

EXPERTS = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([3.0, 6.0])}}


def merged(*diagonals: list[float], **params) -> torch.Tensor:
    stats = {name: {"w": torch.tensor(values)} for name, values in zip(EXPERTS, diagonals, strict=True)}
    return merge_state_dicts(None, EXPERTS, "fisher", params, stats)["w"]


def test_by_hand() -> None:
    """(1 * 1 + 3 * 3) / 4 and (2 * 1 + 6 * 1) / 2."""
    result = merged([1.0, 1.0], [3.0, 1.0], normalize=False, floor=1e-8)
    torch.testing.assert_close(result, torch.tensor([2.5, 4.0]))


def test_a_huge_diagonal_wins() -> None:
    torch.testing.assert_close(merged([1e6, 1e-6], [1e-6, 1e6], normalize=False), torch.tensor([1.0, 6.0]))


def test_entries_that_nobody_cares_for_are_averaged() -> None:
    torch.testing.assert_close(merged([0.0, 0.0], [0.0, 0.0]), torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(merged([0.0, 1.0], [0.0, 1.0]), torch.tensor([2.0, 4.0]))


def test_normalised_the_size_of_an_experts_diagonal_is_irrelevant() -> None:
    small, large = merged([1.0, 2.0], [3.0, 1.0]), merged([100.0, 200.0], [3.0, 1.0])
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)
    plain = merged([1.0, 2.0], [3.0, 1.0], normalize=False), merged([100.0, 200.0], [3.0, 1.0], normalize=False)
    assert not torch.allclose(*plain, rtol=1e-2)


def test_the_norm_is_taken_over_the_model() -> None:
    """Of two tensors, one expert's diagonal is a hundredfold in the first only; the second feels it."""
    experts = {name: {"w": tensors["w"], "v": tensors["w"].clone()} for name, tensors in EXPERTS.items()}
    ones = torch.ones(2)
    stats = {"a": {"w": 100 * ones, "v": ones}, "b": {"w": ones, "v": ones}}
    result = merge_state_dicts(None, experts, "fisher", {}, stats)
    norms = np.sqrt([2 * 100**2 + 2, 4])
    share = (1 / norms) / (1 / norms).sum()
    expected = share[0] * np.array([1, 2]) + share[1] * np.array([3, 6])
    np.testing.assert_allclose(result["v"].numpy(), expected, rtol=1e-4)


def test_coefficients() -> None:
    result = merged([1.0, 1.0], [1.0, 1.0], weights=[1.0, 3.0])
    torch.testing.assert_close(result, torch.tensor([2.5, 5.0]))
    torch.testing.assert_close(merged([1.0, 1.0], [9.0, 9.0], weights=[1.0, 0.0]), EXPERTS["a"]["w"])


@pytest.mark.parametrize("normalize", [True, False])
def test_against_numpy(normalize: bool) -> None:
    random = np.random.default_rng(0)
    weights, diagonals = random.normal(size=(3, 4, 5)), random.normal(size=(3, 4, 5)) ** 2
    experts = {f"e{i}": {"w": torch.tensor(w, dtype=torch.float32)} for i, w in enumerate(weights)}
    stats = {f"e{i}": {"w": torch.tensor(d, dtype=torch.float32)} for i, d in enumerate(diagonals)}
    ours = merge_state_dicts(None, experts, "fisher", {"normalize": normalize}, stats)["w"]
    factors = 1 / np.sqrt((diagonals**2).sum((1, 2))) if normalize else np.ones(3)
    importance = factors[:, None, None] * (diagonals + 1e-6)
    np.testing.assert_allclose(ours.numpy(), (importance * weights).sum(0) / importance.sum(0), rtol=1e-4, atol=1e-5)


def test_every_tensor_needs_its_diagonal() -> None:
    experts = {name: {**tensors, "v": torch.ones(2)} for name, tensors in EXPERTS.items()}
    stats = {name: {"w": torch.ones(2)} for name in experts}
    with pytest.raises(ValueError, match="fisher needs Fisher values for every tensor, and v has none"):
        merge_state_dicts(None, experts, "fisher", {}, stats)


def test_broken_diagonals_are_refused() -> None:
    with pytest.raises(MergeError, match="cannot be negative, got -1"):
        merged([1.0, -1.0], [1.0, 1.0])
    with pytest.raises(MergeError, match=r"w: statistics are NaN or infinite for b"):
        merged([1.0, 1.0], [1.0, float("nan")])
    with pytest.raises(MergeError, match="shaped like the weights"):
        merged([1.0], [1.0])
    with pytest.raises(MergeError, match=r"w: statistics differ in shape: a \(2,\), b \(1,\)"):
        merged([1.0, 1.0], [1.0])


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0]])
def test_coefficients_that_divide_by_zero_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must not be negative, nor all zero"):
        merged([1.0, 1.0], [1.0, 1.0], weights=weights)
