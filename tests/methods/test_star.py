"""STAR: fewer directions, the same nuclear norm."""

from __future__ import annotations

import pytest
import torch

from methods.kinds import Place
from methods.star import StarParams, star


def test_by_hand() -> None:
    """4 + 3 of 4 + 3 + 2 + 1 cover 0.6: they are stretched by 10 / 7; the other expert keeps one, and changes halve."""
    experts = torch.stack([torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), torch.diag(torch.tensor([9.0, 1.0, 0, 0]))])
    merged = star(torch.zeros(4, 4), experts, StarParams(eta=0.6), place=Place())
    torch.testing.assert_close(merged, torch.diag(torch.tensor([40 / 7 + 10, 30 / 7, 0, 0])) / 2)


@pytest.mark.parametrize("eta", [0.2, 0.5, 0.9])
def test_one_expert_keeps_its_nuclear_norm(eta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base, expert = torch.randn(12, 8, generator=generator), torch.randn(12, 8, generator=generator)
    change = star(base, expert[None], StarParams(eta=eta), place=Place()) - base
    norms = [float(torch.linalg.svdvals(matrix).sum()) for matrix in (change, expert - base)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) < 8


def test_all_of_the_norm_is_the_average() -> None:
    generator = torch.Generator().manual_seed(0)
    base, experts = torch.randn(5, 7, generator=generator), torch.randn(3, 5, 7, generator=generator)
    merged = star(base, experts, StarParams(eta=1.0), place=Place())
    torch.testing.assert_close(merged, experts.mean(0), rtol=1e-5, atol=1e-5)


def test_eta_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"eta is a share in \(0, 1\], got 40"):
        StarParams(eta=40)
