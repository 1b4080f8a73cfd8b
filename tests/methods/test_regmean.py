import numpy as np
import pytest
import torch

from harness.merge import MergeError, merge_state_dicts


def problem(n_inputs: int = 50, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights (T, out, in) and inputs (T, n, in)."""
    random = np.random.default_rng(seed)
    return random.normal(size=(3, 4, 6)), random.normal(size=(3, n_inputs, 6)) * random.uniform(0.5, 2, (3, 1, 6))


def merged(weights: np.ndarray, inputs: np.ndarray, **params) -> np.ndarray:
    experts = {f"e{i}": {"fc.weight": torch.tensor(w, dtype=torch.float32)} for i, w in enumerate(weights)}
    grams = {f"e{i}": {"fc": torch.tensor(x.T @ x, dtype=torch.float32)} for i, x in enumerate(inputs)}
    return merge_state_dicts(None, experts, "regmean", params, grams)["fc.weight"].numpy()


def squared_error(weight: np.ndarray, weights: np.ndarray, inputs: np.ndarray) -> float:
    """Sum over experts of |X W^T - X W_i^T|^2."""
    return sum(float(((x @ weight.T - x @ own.T) ** 2).sum()) for own, x in zip(weights, inputs, strict=True))


def test_by_hand() -> None:
    """One input: the mean weighed by its energy, (1 * 2 + 3 * 6) / 4."""
    weights, inputs = np.array([[[2.0]], [[6.0]]]), np.array([[[1.0]], [[np.sqrt(3.0)]]])
    np.testing.assert_allclose(merged(weights, inputs), [[5.0]], rtol=1e-6)


def test_no_other_weight_has_outputs_closer_to_the_experts() -> None:
    weights, inputs = problem()
    best = merged(weights, inputs, off_diagonal=1.0)
    least = squared_error(best, weights, inputs)
    random = np.random.default_rng(1)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(10):
            assert squared_error(best + size * random.normal(size=best.shape), weights, inputs) > least
    assert least < squared_error(weights.mean(0), weights, inputs)


def test_it_is_the_least_squares_solution() -> None:
    weights, inputs = problem()
    stacked = np.concatenate(list(inputs))
    outputs = np.concatenate([x @ w.T for w, x in zip(weights, inputs, strict=True)])
    expected = np.linalg.lstsq(stacked, outputs, rcond=None)[0].T
    np.testing.assert_allclose(merged(weights, inputs, off_diagonal=1.0), expected, rtol=1e-4, atol=1e-5)


def test_only_the_diagonal() -> None:
    """Off-diagonal entries gone, each column is a mean weighed by its input's energy."""
    weights, inputs = problem()
    energy = (inputs**2).sum(1)  # (T, in)
    expected = (weights * energy[:, None]).sum(0) / energy.sum(0)
    np.testing.assert_allclose(merged(weights, inputs, off_diagonal=0.0), expected, rtol=1e-4, atol=1e-5)


def test_dead_inputs_take_the_average() -> None:
    weights, inputs = problem()
    inputs[:, :, 2] = 0
    result = merged(weights, inputs)
    np.testing.assert_allclose(result[:, 2], weights.mean(0)[:, 2], rtol=1e-5)
    alive = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(
        result[:, alive], merged(weights[:, :, alive], inputs[:, :, alive]), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(merged(weights, 0 * inputs), weights.mean(0), rtol=1e-5)


def test_fewer_inputs_than_columns() -> None:
    """The bare inverse of the paper does not exist; the outputs on the inputs that there are still agree best."""
    weights, inputs = problem(n_inputs=1)
    result = merged(weights, inputs, off_diagonal=1.0)
    assert np.isfinite(result).all()
    assert squared_error(result, weights, inputs) < 1e-6


def test_without_a_ridge_a_singular_sum_is_an_error() -> None:
    weights, inputs = problem()
    np.testing.assert_allclose(merged(weights, inputs, ridge=0.0), merged(weights, inputs), rtol=1e-4, atol=1e-5)
    inputs[:, :, 2] = 0
    with pytest.raises(MergeError, match=r"regmean failed on fc.weight \(4, 6\)"):
        merged(weights, inputs, ridge=0.0)


def test_what_has_no_gram_matrix_is_averaged() -> None:
    experts = {"a": {"fc.weight": torch.eye(2), "norm": torch.tensor([1.0])}}
    experts["b"] = {"fc.weight": 3 * torch.eye(2), "norm": torch.tensor([5.0])}
    grams = {name: {"fc.weight": torch.eye(2)} for name in experts}
    result = merge_state_dicts(None, experts, "regmean", {}, grams)
    assert result["norm"].tolist() == [3.0]
    torch.testing.assert_close(result["fc.weight"], 2 * torch.eye(2))


def test_a_gram_matrix_of_another_size_is_refused() -> None:
    experts = {name: {"fc.weight": torch.ones(4, 6)} for name in ("a", "b")}
    grams = {name: {"fc.weight": torch.eye(4)} for name in experts}
    with pytest.raises(
        MergeError, match=r"fc.weight .*a Gram matrix is \(in, in\) for a weight \(out, in\), got \(4, 4\)"
    ):
        merge_state_dicts(None, experts, "regmean", {}, grams)


def test_a_gram_matrix_for_some_experts_only_is_refused() -> None:
    experts = {name: {"fc.weight": torch.ones(4, 6), "out.weight": torch.ones(4, 6)} for name in ("a", "b")}
    grams = {"a": {"fc.weight": torch.eye(6), "out.weight": torch.eye(6)}, "b": {"out.weight": torch.eye(6)}}
    with pytest.raises(MergeError, match=r"fc.weight: statistics are missing for b"):
        merge_state_dicts(None, experts, "regmean", {}, grams)
