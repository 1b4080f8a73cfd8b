import numpy as np
import pytest
import torch

from harness.merge import MergeError, merge_state_dicts
from methods.cat_merging import removal_basis
from tests.methods.samples import SampleRoles

ROLES = SampleRoles()
NAME = "fc1.weight"


def informed(deltas: np.ndarray, stats: np.ndarray | None, name: str = NAME, **params) -> np.ndarray:
    base = {name: torch.zeros(deltas.shape[1:])}
    experts = {f"e{i}": {name: torch.tensor(delta, dtype=torch.float32)} for i, delta in enumerate(deltas)}
    given = {f"e{i}": {} if stats is None else {name: torch.tensor(stats[i])} for i in range(len(deltas))}
    params = {"scale": 1.0, "rank": 1, **params}
    return merge_state_dicts(base, experts, "cat_merging_informed", params, given, roles=ROLES)[name].numpy()


def test_by_hand() -> None:
    """Task 0's inputs lie along the first axis: what the other change writes from there, to output 0, is removed."""
    deltas = np.zeros((2, 4, 2))
    deltas[0, 3, 1] = 1  # reads what neither has
    deltas[1, 0, 0], deltas[1, 1, 1] = 3, 2  # writes output 0 from axis 0, which task 0 uses, and output 1 from its own
    grams = np.array([[[1.0, 0], [0, 0]], [[0, 0], [0, 1.0]]], dtype=np.float32)
    expected = deltas.sum(0)
    expected[0] = 0  # of expert 1
    expected[3] = 0  # of expert 0, which writes it from what task 1 uses
    np.testing.assert_allclose(informed(deltas, grams), expected, atol=1e-6)


def test_against_numpy() -> None:
    random = np.random.default_rng(0)
    deltas, inputs = random.normal(size=(3, 12, 7)), random.normal(size=(3, 9, 7))
    grams = np.einsum("tsa,tsb->tab", inputs, inputs)
    left = [delta.copy() for delta in deltas]
    for k in range(3):
        conflict = sum(deltas[i] @ (grams[k] - 0.7 * grams[i]) @ deltas[i].T for i in range(3) if i != k)
        basis = np.linalg.eigh(conflict)[1][:, -2:]
        left = [own if i == k else own - basis @ basis.T @ own for i, own in enumerate(left)]
    ours = informed(deltas, grams.astype(np.float32), rank=2, preserve=0.7, scale=0.4)
    np.testing.assert_allclose(ours, 0.4 * sum(left), atol=1e-5)


def test_no_other_direction_disturbs_more() -> None:
    """What is removed of the one change acts more on the other task's inputs, less on its own, than any direction."""
    random = np.random.default_rng(1)
    change, inputs = random.normal(size=(8, 5)), random.normal(size=(2, 6, 5))
    grams = np.einsum("tsa,tsb->tab", inputs, inputs)
    removed = change - informed(np.stack([np.zeros((8, 5)), change]), grams.astype(np.float32))

    def disturbance(part: np.ndarray) -> float:
        return float(((inputs[0] @ part.T) ** 2).sum() - ((inputs[1] @ part.T) ** 2).sum())

    assert np.linalg.matrix_rank(removed, tol=1e-4) == 1
    for direction in random.normal(size=(50, 8)):
        unit = direction / np.linalg.norm(direction)
        assert disturbance(np.outer(unit, unit) @ change) < disturbance(removed)


@pytest.mark.parametrize("inner", [40, 2])
def test_the_basis_of_a_wide_layer_is_as_good_as_that_of_all_eigenvectors(inner: int) -> None:
    """Also of changes of low rank, whose space is soon used up; the basis is orthonormal."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    deltas, inputs = normal(2, 300, inner) @ normal(2, inner, 40), normal(3, 50, 40) * torch.linspace(0.1, 3, 40)
    grams = inputs.mT @ inputs
    basis = removal_basis(deltas, grams[1:], grams[0], 0.5, 3)
    whole = sum(delta @ (grams[0] - 0.5 * gram) @ delta.mT for delta, gram in zip(deltas, grams[1:], strict=True))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3, dtype=torch.float64))
    best = torch.linalg.eigvalsh(whole)[-3:].sum()
    assert float((basis.mT @ whole @ basis).trace()) == pytest.approx(float(best), rel=1e-3)


def test_a_shift_is_masked_where_others_move_most() -> None:
    deltas = np.array([[1.0, 5, 2, 3], [7.0, 1, 2, 3]])
    np.testing.assert_allclose(informed(deltas, None, name="bias"), [1, 1, 4, 6])


def test_a_scale_is_masked_where_what_it_scales_is_large() -> None:
    """Change squared times (mean square of the task's own - that of the expert's) is largest at the third entry."""
    deltas = np.array([[1.0, 1, 1, 1], [2.0, 2, 2, 2]])
    squares = np.array([[0, 0, 1, 0], [0, 1, 0, 0]], dtype=np.float32)
    np.testing.assert_allclose(informed(deltas, squares, name="norm.weight"), [3, 2, 1, 3])


@pytest.mark.parametrize("name", ["fc1.weight", "embedding"])
def test_without_data_rows_stand_for_inputs(name: str) -> None:
    """Only where they are those of a linear layer; the energy of each is made the same."""
    random = np.random.default_rng(2)
    deltas = random.normal(size=(3, 12, 7)) * np.array([1.0, 10, 0.1])[:, None, None]
    base = {name: torch.zeros(12, 7)}
    experts = {f"e{i}": {name: torch.tensor(delta, dtype=torch.float32)} for i, delta in enumerate(deltas)}
    ours = merge_state_dicts(base, experts, "cat_merging", {"scale": 1.0, "rank": 2}, roles=ROLES)[name]
    grams = np.einsum("tsa,tsb->tab", deltas, deltas)
    grams /= np.trace(grams, axis1=1, axis2=2)[:, None, None] / 7
    wanted = informed(deltas, grams.astype(np.float32), rank=2) if name == "fc1.weight" else deltas.sum(0)
    np.testing.assert_allclose(ours.numpy(), wanted, rtol=1e-3, atol=1e-3)


def test_narrow_tensors_keep_half_of_their_outputs() -> None:
    """Of 2 outputs with 3 experts nothing can be removed; of 5, one by each."""
    deltas = np.random.default_rng(3).normal(size=(3, 5, 4))
    grams = np.stack([np.eye(4)] * 3).astype(np.float32)
    np.testing.assert_allclose(informed(deltas[:, :2], grams), deltas[:, :2].sum(0), atol=1e-6)
    np.testing.assert_allclose(informed(deltas, grams, rank=16), informed(deltas, grams, rank=1), atol=1e-6)


def test_features_of_another_shape_are_refused() -> None:
    with pytest.raises(
        MergeError, match=r"features are \(in, in\) for a weight \(out, in\).*got \(4, 4\) for \(8, 5\)"
    ):
        informed(np.ones((2, 8, 5)), np.ones((2, 4, 4), dtype=np.float32))


@pytest.mark.parametrize("given", [{"rank": 0}, {"preserve": -1.0}, {"scale": float("nan")}])
def test_parameters_out_of_range(given) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        informed(np.ones((2, 8, 5)), None, **given)
