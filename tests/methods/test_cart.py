"""CART: leading directions away from the average."""

from __future__ import annotations

import pytest
import torch

from methods.cart import CartParams, cart
from methods.kinds import Place


def test_by_hand() -> None:
    """Three experts at diag(3, 0), diag(0, 3) and 0: from their mean diag(1, 1) each goes along its one direction."""
    experts = torch.stack([torch.diag(torch.tensor(entries)) for entries in ([3.0, 0.0], [0.0, 3.0], [0.2, 0.0])])
    mean = torch.diag(torch.tensor([3.2 / 3, 1.0]))
    along = [torch.diag(torch.tensor([3 - 3.2 / 3, 0])), torch.diag(torch.tensor([0.0, 2.0]))]
    along.append(torch.diag(torch.tensor([0.0, -1.0])))
    merged = cart(None, experts, CartParams(rank=0.5, scale=0.5), place=Place())
    torch.testing.assert_close(merged, mean + 0.5 * sum(along))


def test_whole_changes_and_vectors_are_averaged() -> None:
    experts = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cart(None, experts, CartParams(rank=1.0, scale=3.0), place=Place()), experts.mean(0))
    torch.testing.assert_close(cart(None, experts[:, 0], CartParams(), place=Place()), experts[:, 0].mean(0))


def test_at_least_one_direction_is_kept() -> None:
    experts = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    kept = cart(None, experts, CartParams(rank=0.01), place=Place()) - experts.mean(0)
    assert kept.abs().max() < 1e-6  # the two changes from the mean are each other's negative
    moved = cart(None, torch.cat([experts, experts[:1] * 2]), CartParams(rank=0.01), place=Place())
    assert not torch.allclose(moved, torch.cat([experts, experts[:1] * 2]).mean(0))


def test_a_rank_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"rank is a share in \(0, 1\], got 8"):
        CartParams(rank=8)
