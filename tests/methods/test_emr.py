from __future__ import annotations

import pytest
import torch

from methods.emr import EmrParams, emr, rescalers, restore
from methods.kinds import Piece


def walk_over(*pieces: Piece):
    return lambda function, limit=None: [function(piece) for piece in pieces]


BASE = torch.tensor([10.0, 10.0, 10.0, 10.0])
EXPERTS = BASE + torch.tensor([[1.0, -2.0, 0.0, 3.0], [2.0, 1.0, 4.0, -3.0]])


def test_by_hand() -> None:
    """Sums 3, -1, 4, 0: elected +, -, +, none; largest that agree 2, -2, 4, none; |delta| 6 and 10."""
    numbers = rescalers(walk_over(Piece("w", BASE, EXPERTS)), EmrParams())
    torch.testing.assert_close(numbers, torch.tensor([6 / 4, 10 / 6]))
    packed = emr(BASE, EXPERTS, EmrParams(), numbers=numbers)
    assert packed["unified"].tolist() == [2, -2, 4, 0]
    assert packed["masks"].tolist() == [[0b0011], [0b0101]]
    first, second = (restore(BASE, packed, index, EmrParams()) for index in (0, 1))
    torch.testing.assert_close(first, BASE + 1.5 * torch.tensor([2.0, -2.0, 0.0, 0.0]))
    torch.testing.assert_close(second, BASE + 10 / 6 * torch.tensor([2.0, 0.0, 4.0, 0.0]))


def test_the_rescaler_is_over_all_entries_of_the_model() -> None:
    parts = [Piece("v", BASE[:1], EXPERTS[:, :1]), Piece("w", BASE[1:], EXPERTS[:, 1:])]
    whole = rescalers(walk_over(Piece("w", BASE, EXPERTS)), EmrParams())
    assert torch.equal(rescalers(walk_over(*parts), EmrParams()), whole)


def test_an_empty_mask_has_the_scale_one() -> None:
    experts = torch.stack([BASE, BASE + 1])
    assert rescalers(walk_over(Piece("w", BASE, experts)), EmrParams()).tolist() == [1, 1]


def test_what_is_kept_keeps_the_experts_mean_change() -> None:
    """The rescaler makes the restored change as long as the expert's own, in the L1 norm."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, generator=generator)
    experts = base + torch.randn(4, 50, generator=generator)
    numbers = rescalers(walk_over(Piece("w", base, experts)), EmrParams())
    packed = emr(base, experts, EmrParams(), numbers=numbers)
    for index, expert in enumerate(experts):
        ours = (restore(base, packed, index, EmrParams()) - base).abs().sum()
        assert float(ours) == pytest.approx(float((expert - base).abs().sum()), rel=1e-5)
