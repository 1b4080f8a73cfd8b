import numpy as np
import pytest
import torch

from harness.merge import merge_state_dicts
from methods.sparse_gpt import SparseGptParams
from tests.methods.test_wanda import NAME, layer, loss, pruned


def by_definition(weight: np.ndarray, gram: np.ndarray, kept: np.ndarray, damp: float) -> np.ndarray:
    """Equations 2 and 3 of the paper with a given mask, a fresh inverse for every input: no Cholesky, no blocks."""
    weight = weight.astype(np.float64).copy()
    hessian = gram + damp * np.mean(np.diag(gram)) * np.eye(len(gram))
    for column in range(len(gram)):
        inverse = np.linalg.inv(hessian[column:, column:])
        for row in range(len(weight)):
            if not kept[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column] = 0
    return weight


def test_by_hand() -> None:
    """Inputs as good as equal: the weight that goes is added to the one that stays."""
    weight = torch.tensor([[1.0, 2.0]])
    grams = {"a": {NAME: torch.ones(2, 2)}}
    found = pruned({"a": {NAME: weight}}, grams, "sparse_gpt", damp=1e-6)
    torch.testing.assert_close(found, torch.tensor([[0.0, 3.0]]), atol=1e-4, rtol=0)
    alone = pruned({"a": {NAME: weight}}, {"a": {NAME: torch.eye(2)}}, "sparse_gpt")
    assert alone.tolist() == [[0, 2]], "nothing to make up for where inputs have nothing in common"


@pytest.mark.parametrize("params", [{}, {"block": 3}, {"scope": "row", "block": 4}, {"n": 2}, {"n": 1, "m": 3}])
def test_it_is_the_papers_update(params: dict) -> None:
    experts, grams, _ = layer()
    found = pruned(experts, grams, "sparse_gpt", **params)
    expected = by_definition(experts["a"][NAME].numpy(), grams["a"][NAME].double().numpy(), (found != 0).numpy(), 0.01)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("params", [{}, {"n": 2}, {"n": 1, "m": 4}, {"density": 0.25}, {"density": 0.75}])
def test_its_outputs_are_closer_than_those_of_masks_alone(params: dict) -> None:
    """The order of the papers, over ten layers; the greedy choice need not win on each."""
    totals = dict.fromkeys(("sparse_gpt", "wanda", "prune_magnitude"), 0.0)
    for seed in range(10):
        experts, grams, inputs = layer(seed=seed)
        for name in totals:
            found = merge_state_dicts(None, experts, name, params, grams if name != "prune_magnitude" else None)
            totals[name] += loss(found[NAME], experts["a"][NAME], inputs[0])
    assert totals["sparse_gpt"] < totals["wanda"] < totals["prune_magnitude"]


@pytest.mark.parametrize("block", [1, 3, 8, 128])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 1.0])
def test_the_share_is_met_over_the_tensor_whatever_the_blocks(block: int, density: float) -> None:
    experts, grams, _ = layer()
    found = pruned(experts, grams, "sparse_gpt", block=block, density=density)
    assert int(found.count_nonzero()) == int(density * 40)
    in_rows = pruned(experts, grams, "sparse_gpt", block=block, density=density, scope="row")
    assert (in_rows.count_nonzero(dim=1) == max(1, int(density * 8))).all()
    if density == 1:
        assert torch.equal(found, experts["a"][NAME])


@pytest.mark.parametrize("block", [1, 4, 6, 128])
def test_n_of_m_are_kept_in_every_group(block: int) -> None:
    """Whatever the block, which is brought to a multiple of m: 2:4 is not all that there is."""
    experts, grams, _ = layer()
    for n, m in ((2, 4), (1, 4), (3, 4), (1, 2)):
        found = pruned(experts, grams, "sparse_gpt", n=n, m=m, block=block)
        assert (found.reshape(5, -1, m).count_nonzero(dim=2) == n).all()
    found = pruned(experts, grams, "sparse_gpt", n=2, m=3, block=block)  # 3 + 3 + 2
    assert found[:, :3].count_nonzero(dim=1).tolist() == [2] * 5
    assert found[:, 6:].count_nonzero(dim=1).tolist() == [2] * 5


def test_inputs_that_are_never_active() -> None:
    """Their weights go first; with none active it is by magnitude."""
    experts, grams, _ = layer()
    gram = grams["a"][NAME].clone()
    gram[2], gram[:, 2] = 0, 0
    found = pruned(experts, {"a": {NAME: gram}}, "sparse_gpt")
    assert not found[:, 2].any()
    assert int(found.count_nonzero()) == 20
    none = pruned(experts, {"a": {NAME: torch.zeros(8, 8)}}, "sparse_gpt")
    plain = merge_state_dicts(None, experts, "prune_magnitude", {"scope": "tensor"})[NAME]
    torch.testing.assert_close(none, plain)


def test_bad_input_is_named() -> None:
    for params, said in (({"block": 0}, "block must be at least 1"), ({"damp": 0.0}, "damp must be positive")):
        with pytest.raises(ValueError, match=said):
            SparseGptParams(**params)
