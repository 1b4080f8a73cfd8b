import copy

import pytest
import torch

from methods.mixed_linear import Sparse
from methods.mixtures import fix_gates
from methods.sparse_we_moe import SparseWeMoeParams, sparse_we_moe
from methods.we_moe import WeMoeParams, we_moe
from tests.methods.test_we_moe import INPUTS, Model, Roles, models


def built(base: Model, experts: list[Model], **params) -> Model:
    return sparse_we_moe(copy.deepcopy(base), experts, SparseWeMoeParams(**params), Roles())


def test_by_hand() -> None:
    """Half of four entries: those of the largest magnitude, gates 2 and 1."""
    kept = Sparse(torch.tensor([[[4.0, -1.0], [0.5, -3.0]], [[1.0, 5.0], [2.0, 0.0]]]), 0.5)
    assert kept.mixed(torch.tensor([2.0, 1.0])).tolist() == [[8.0, 5.0], [2.0, -6.0]]
    x, gates = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[2.0, 1.0]]])
    assert kept.applied(x, gates).tolist() == [[[13.0, -4.0]]]
    assert {name: tuple(own.shape) for name, own in kept.state_dict().items()} == {"values": (2, 2), "places": (2, 2)}


def test_all_entries_are_we_moe() -> None:
    base, experts = models()
    whole, dense = built(base, experts, density=1.0), we_moe(copy.deepcopy(base), experts, WeMoeParams(), Roles())
    for module in (whole, dense):
        fix_gates(module, [0.2, 0.9, -0.1])
    torch.testing.assert_close(whole(INPUTS), dense(INPUTS))


def test_what_is_kept_of_the_changes() -> None:
    base, experts = models()
    module = built(base, experts, density=0.25)
    fix_gates(module, [0.0, 1.0, 0.0])
    change = module.block.mlp.block.get_submodule("0").changes.mixed(torch.tensor([0.0, 1.0, 0.0]))
    delta = (experts[1].block.mlp[0].weight - base.block.mlp[0].weight).detach()
    assert int((change != 0).sum()) == 6
    torch.testing.assert_close(change[change != 0], delta[change != 0])
    assert float(delta[change == 0].abs().max()) <= float(change[change != 0].abs().min())


def test_blocks_of_several_widths_cannot_share_a_router() -> None:
    class Two(Roles):
        def feed_forwards(self):
            return (("block.mlp.0",), ("block.mlp.2",))

    base, experts = models()
    with pytest.raises(ValueError, match="shares one router, and blocks are 4 and 6 wide: shared=false"):
        sparse_we_moe(copy.deepcopy(base), experts, SparseWeMoeParams(), Two())
    apart = sparse_we_moe(base, experts, SparseWeMoeParams(shared=False), Two())
    assert apart.block.mlp[0].router is not apart.block.mlp[2].router


def test_gradients_reach_the_router() -> None:
    base, experts = models()
    module = built(base, experts)
    module(INPUTS).square().sum().backward()
    trainable = {name: own for name, own in module.named_parameters() if own.requires_grad}
    assert all(".router." in name for name in trainable)
    assert max(float(own.grad.abs().max()) for own in trainable.values()) > 0


def test_params_are_checked() -> None:
    with pytest.raises(ValueError, match="density is a share"):
        SparseWeMoeParams(density=0.0)
