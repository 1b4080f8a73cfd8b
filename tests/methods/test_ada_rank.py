import pytest
import torch

from methods.ada_rank import AdaRankParams, ada_rank
from methods.kinds import Place, Stack
from tests.methods.stacks import SHAPES, assert_slopes, loss_of, pulled, searched, stack, targets


def test_by_hand() -> None:
    """diag(3, 1) and diag(0, 2): the larger component of each is kept, with the coefficient 0.5."""
    deltas = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([0.0, 2.0]))])
    own = Stack({"w": torch.eye(2)}, {"w": deltas}, {"w": Place(linear=True)})
    search = ada_rank(own, AdaRankParams(rank_share=0.5, scale=0.5))
    torch.testing.assert_close(search.weight("w"), torch.diag(torch.tensor([2.5, 2.0])))
    assert torch.equal(search.learnt["mask/w"].sign(), torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    search.learnt["mask/w"][0, 1] = 0.01
    torch.testing.assert_close(search.weight("w"), torch.diag(torch.tensor([2.5, 2.5])))


@pytest.mark.parametrize("origin", ["base", "mean"])
def test_all_components_are_task_arithmetic_from_the_origin(origin: str) -> None:
    own, plain = stack(), stack()
    search = ada_rank(own, AdaRankParams(origin=origin, scale=0.4))
    assert set(search.logits) == {"layers.0.q", "layers.1.q"}
    for name in SHAPES:
        mean = plain.deltas[name].mean(0) if origin == "mean" else torch.zeros(SHAPES[name])
        expected = plain.base[name] + mean + 0.4 * (plain.deltas[name] - mean).sum(0)
        torch.testing.assert_close(search.weight(name), expected, atol=1e-5, rtol=1e-4)


def test_coefficients_slopes_and_those_of_masks() -> None:
    """A mask's slope is the change's inner product with the weights' gradient, through the sigmoid."""
    own = stack()
    wanted = targets(own)
    search = ada_rank(own, AdaRankParams(rank_share=0.5))
    assert_slopes(search, wanted, ["coefficients"])
    pulled(search, wanted)
    weights = {name: search.weight(name).requires_grad_() for name in SHAPES}
    loss_of(weights, wanted).backward()
    name, expert, rank = "layers.1.q", 1, 2
    part = (
        search.u[name].view(4, 3, 4)[:, expert, rank, None]
        * search.s[name][expert, rank]
        * search.vt[name].view(3, 4, 6)[expert, rank]
    )
    soft = torch.sigmoid(search.logits[name][expert, rank] / 10)
    expected = 0.3 * (part * weights[name].grad).sum() * soft * (1 - soft) / 10
    torch.testing.assert_close(search.learnt[f"mask/{name}"].grad[expert, rank], expected)


def test_what_is_learnt_lowers_the_loss_and_masks_change() -> None:
    own = stack()
    wanted = targets(own)
    search = ada_rank(own, AdaRankParams(steps=200, lr=0.02, rank_share=0.5))
    before = {name: logits > 0 for name, logits in search.logits.items()}
    losses = searched(search, wanted)
    assert losses[-1] < 0.7 * losses[0]
    assert any(not torch.equal(logits > 0, before[name]) for name, logits in search.logits.items())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rank_share": 0.0}, "rank_share is a share"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"origin": "moon"}, "origin is one of base, mean"),
    ],
)
def test_params_are_checked(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaRankParams(**params)


def test_without_a_matrix_there_is_nothing_to_learn() -> None:
    own = Stack({"w": torch.zeros(2)}, {"w": torch.ones(2, 2)}, {"w": Place()})
    with pytest.raises(
        ValueError, match="with matrices=linear none of the 1 merged tensors is one; matrices=all takes"
    ):
        ada_rank(own, AdaRankParams())


def test_layers_stored_the_other_way_round_are_decomposed_too() -> None:
    own = Stack({"w": torch.zeros(2, 3)}, {"w": torch.ones(2, 2, 3)}, {"w": Place(transposed=True)})
    assert set(ada_rank(own, AdaRankParams()).logits) == {"w"}
