import copy

import pytest
import torch

from methods.mixed_linear import RankOne, low_rank
from methods.mixtures import fix_gates
from methods.rankone_moe import RankoneMoeParams, rankone_moe
from tests.methods.test_we_moe import INPUTS, Model, Roles, models, task_arithmetic


def built(base: Model, experts: list[Model], **params) -> Model:
    return rankone_moe(copy.deepcopy(base), experts, RankoneMoeParams(**params), Roles())


def test_by_hand() -> None:
    """Diagonal changes (3, 1) and (2, 4): their first directions are the first and the second entry."""
    kept = RankOne(torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 4.0]))]), 1)
    found = kept.mixed(torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(found, torch.diag(torch.tensor([1.5, 8.0])))
    applied = kept.applied(torch.ones(1, 1, 2), torch.tensor([[[0.5, 2.0]]]))
    torch.testing.assert_close(applied, found.sum(1)[None, None])


def test_beyond_full_rank_there_is_nothing() -> None:
    deltas = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    left, right = low_rank(deltas, 6)
    assert left.shape == (2, 3, 6)
    assert right.shape == (2, 6, 5)
    torch.testing.assert_close(left @ right, deltas)
    assert not left[..., 3:].any()


def test_equal_gates_are_task_arithmetic() -> None:
    base, experts = models()
    module = built(base, experts, scale=0.4)
    fix_gates(module, [0.4] * 3)
    torch.testing.assert_close(module(INPUTS), task_arithmetic(base, experts, [0.4] * 3)(INPUTS))


def test_an_example_uses_its_largest_gates() -> None:
    base, experts = models()
    module = built(base, experts, rank=2, select=3)
    torch.nn.init.normal_(module.block.mlp.router.net.weight)
    gates = module.block.mlp.gates(INPUTS)  # (B, T rank)
    assert gates.shape == (5, 6)
    assert (gates != 0).sum(1).tolist() == [3] * 5
    all_of_them = built(base, experts, rank=2)
    all_of_them.load_state_dict(module.state_dict())
    free = all_of_them.block.mlp.gates(INPUTS)
    torch.testing.assert_close(gates.sum(1), free.topk(3).values.sum(1))


def test_params_are_checked() -> None:
    for wrong in ({"rank": 0}, {"select": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1"):
            RankoneMoeParams(**wrong)
