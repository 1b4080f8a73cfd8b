import itertools

import pytest
import torch

from harness.compress import Expert, pack
from harness.inputs import Inputs
from harness.merge import Merge, merge_state_dicts
from methods.catalogue import find
from methods.sparse_low_rank import SparseLowRankParams, entries, pursued
from tests.methods.samples import SampleRoles

NAME = "layers.0.fc1.weight"


def models(seed: int = 0) -> tuple[dict, dict]:
    """A base and an expert (24, 16) whose change is ten large entries and two directions."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(24, 16, generator=generator)
    sparse = torch.zeros(24 * 16)
    sparse[torch.randperm(24 * 16, generator=generator)[:10]] = 20.0
    low = torch.randn(24, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    return {NAME: base}, {"a": {NAME: base + sparse.reshape(24, 16) + low}}


def restored(base: dict, experts: dict, row: str = "sparse_low_rank", stats=None, **params) -> torch.Tensor:
    given = {"expert": "a", **params}
    return merge_state_dicts(base, experts, row, given, roles=SampleRoles(), stats=stats)[NAME]


def error(found: torch.Tensor, experts: dict) -> float:
    return float((found - experts["a"][NAME]).square().sum())


def test_what_is_sparse_plus_low_rank_is_found() -> None:
    base, experts = models()
    params = {"density": 10 / 384, "rank": 2, "scope": "tensor", "steps": 60}
    torch.testing.assert_close(restored(base, experts, **params), experts["a"][NAME], atol=1e-3, rtol=0)


@pytest.mark.parametrize("of", ["change", "weights"])
def test_each_step_comes_closer(of: str) -> None:
    base, experts = models()
    errors = [error(restored(base, experts, of=of, rank=2, density=0.1, steps=steps), experts) for steps in range(1, 8)]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_one_step_of_weights_is_pruning_and_the_leading_directions_of_what_it_takes() -> None:
    base, experts = models()
    weight = experts["a"][NAME]
    sparse = merge_state_dicts(None, experts, "prune_magnitude", {"density": 0.25})[NAME]
    u, s, v = torch.linalg.svd(weight - sparse)
    expected = sparse + u[:, :3] @ torch.diag(s[:3]) @ v[:3]
    found = restored(base, experts, of="weights", rank=3, density=0.25, steps=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_entries_are_chosen_by_the_inputs_norms_or_at_random() -> None:
    """One step of weights: what Wanda, or random pruning, keeps, and the leading directions of what it takes."""
    base, experts = models()
    weight = experts["a"][NAME]
    inputs = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)) * torch.arange(16)
    stats = {"a": {NAME: inputs.T @ inputs / 50}}
    for row, pruner, own in (
        ("sparse_low_rank_wanda", "wanda", stats),
        ("sparse_low_rank_random", "prune_random", None),
    ):
        params = {"n": 2, "m": 4}
        sparse = merge_state_dicts(None, experts, pruner, params, roles=SampleRoles(), stats=own)[NAME]
        u, s, v = torch.linalg.svd(weight - sparse)
        expected = sparse + u[:, :3] @ torch.diag(s[:3]) @ v[:3]
        found = restored(base, experts, row, own, of="weights", rank=3, steps=1, **params)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_entries_that_are_chosen_once_stay() -> None:
    """Each step comes closer, and where entries are kept nothing is lost but the last step's directions."""
    base, experts = models()
    given = {"of": "weights", "rank": 2, "density": 0.2, "solver": "once"}
    errors = [error(restored(base, experts, steps=steps, **given), experts) for steps in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    row = find("sparse_low_rank")
    masks = [
        pack(Merge(row, row.load_params()(**given, steps=steps), Inputs(base, experts, SampleRoles()))).tensors
        for steps in (1, 6)
    ]
    assert torch.equal(*(found[f"{NAME}/masks"] for found in masks))
    assert not torch.equal(*(found[f"{NAME}/values"] for found in masks))


def convex(matrix: torch.Tensor, low: torch.Tensor) -> float:
    """What the pursuit minimises; its l1 norm is that of the entries."""
    left = (matrix - low).abs().sum() / max(matrix.shape) ** 0.5
    return float(torch.linalg.matrix_norm(low, ord="nuc") + left)


def test_the_pursuit_finds_what_was_put_in() -> None:
    """Two directions and ten large entries, of which the mask has all and as many again: exactly, in the end."""
    base, experts = models()
    matrix = experts["a"][NAME] - base[NAME]
    mask = matrix.abs() >= matrix.abs().flatten().topk(20).values[-1]
    found = pursued(matrix, mask, 600)
    assert torch.linalg.matrix_rank(found, atol=1e-2) == 2
    outside = (matrix - found)[~mask]
    assert outside.abs().max() < 1e-3
    assert int(((matrix - found).abs() > 1).sum()) == 10
    for other in (matrix, matrix.where(~mask, 0.0), found + 0.01 * (matrix - found)):
        assert convex(matrix, found) < convex(matrix, other)


def test_what_is_told_of_the_pursuit() -> None:
    base, experts = models()
    given = {"solver": "pursuit", "density": 10 / 384, "rank": 2, "scope": "tensor", "steps": 300}
    torch.testing.assert_close(restored(base, experts, **given), experts["a"][NAME], atol=1e-2, rtol=0)
    assert torch.equal(pursued(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), 5), torch.zeros(3, 2))


def test_sparsity_is_counted_of_the_sparse_part() -> None:
    """Entries that happen to be zero count; what is not packed does not."""
    base, experts = models()
    row = find("sparse_low_rank")
    packed = pack(Merge(row, row.load_params()(n=1, m=4), Inputs(base, experts, SampleRoles())))
    assert packed.metrics()["prune/sparsity"] == 0.75
    assert dict(packed.summary())["sparsity"] == "0.7500 of 384 entries of the sparse parts are zero"
    parts = {"values": torch.tensor([[1.0, 0.0, 2.0]]), "left": torch.ones(1, 4, 2), "right": torch.ones(1, 2, 3)}
    assert entries(parts) == (2, 12)
    assert entries({"changes": torch.ones(1, 5)}) == (0, 0)


def test_what_is_stored_is_as_small_as_is_said() -> None:
    """A bit an entry, the share of entries, and rank (m + n) numbers."""
    base, experts = models()
    row = find("sparse_low_rank")
    job = Merge(row, row.load_params()(rank=3, n=1, m=4), Inputs(base, experts, SampleRoles()))
    packed = pack(job)
    sizes = {name.rpartition("/")[2]: tensor.numel() for name, tensor in packed.tensors.items()}
    assert sizes == {"masks": 384 // 8, "values": 384 // 4, "left": 24 * 3, "right": 3 * 16}
    bits = 1 + 32 * (384 / 4 + 3 * 40) / 384
    assert packed.metrics()["compression/bits_per_parameter"] == pytest.approx(bits)
    assert torch.equal(Expert(packed, base, SampleRoles(), "a")[NAME], restored(base, experts, rank=3, n=1, m=4))


def test_a_rank_above_the_shorter_side_is_exact() -> None:
    base, experts = models()
    torch.testing.assert_close(restored(base, experts, rank=99), experts["a"][NAME], atol=1e-4, rtol=0)


def test_bad_input_is_named() -> None:
    for params, said in (
        ({"rank": 0}, "rank must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"solver": "svd"}, "solver is one of anew, once, pursuit; got 'svd'"),
        ({"of": "base"}, "of is one of change, weights; got 'base'"),
        ({"dtype": "int8"}, "dtype is one of"),
    ):
        with pytest.raises(ValueError, match=said):
            SparseLowRankParams(**params)
