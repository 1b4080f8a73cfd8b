from __future__ import annotations

import pytest
import torch

from methods.kinds import Place
from methods.tsv_compress import TsvCompressParams, restore, tsv_compress

HERE = Place()


def restored(base: torch.Tensor, experts: torch.Tensor, place: Place = HERE, **params) -> torch.Tensor:
    made = TsvCompressParams(**params)
    packed = tsv_compress(base, experts, made, place=place)
    return torch.stack([restore(base, packed, index, made, place=place) for index in range(len(experts))])


def test_by_hand() -> None:
    """Two experts keep half of two ranks each, which is the larger entry of a diagonal change."""
    experts = 1 + torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([-1.0, -2.0]))])
    expected = 1 + torch.stack([torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, -2.0]))])
    torch.testing.assert_close(restored(torch.ones(2, 2), experts), expected)


def test_each_keeps_its_share_of_the_ranks_and_one_at_least() -> None:
    base, experts = torch.zeros(6, 8), torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    for params, rank in (({}, 2), ({"share": 0.5}, 3), ({"share": 0.01}, 1), ({"share": 1.0}, 6)):
        packed = tsv_compress(base, experts, TsvCompressParams(**params), place=HERE)
        assert packed["left"].shape == (3, 6, rank)
        assert packed["right"].shape == (3, rank, 8)
    torch.testing.assert_close(restored(base, experts, share=1.0), experts, atol=1e-5, rtol=1e-5)


def test_it_is_the_nearest_matrix_of_its_rank() -> None:
    base, experts = torch.zeros(6, 8), torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    for found, expert in zip(restored(base, experts), experts, strict=True):
        lost = torch.linalg.svdvals(expert)[2:].square().sum().sqrt()
        torch.testing.assert_close(torch.linalg.vector_norm(found - expert), lost)


def test_what_is_no_matrix_is_kept_as_it_is() -> None:
    for shape in ((), (5,), (3, 2, 2, 2)):
        base = torch.ones(shape)
        experts = base + torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(restored(base, experts), experts)


def test_kernels_are_matrices_where_that_is_asked_for() -> None:
    base, experts = torch.zeros(3, 2, 2, 2), torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    packed = tsv_compress(base, experts, TsvCompressParams(matrices="conv"), place=HERE)
    assert packed["right"].shape == (2, 1, 8)
    assert not torch.allclose(restored(base, experts, matrices="conv"), experts)


def test_linear_layers_only() -> None:
    base, experts = torch.zeros(4, 4), torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(restored(base, experts, matrices="linear"), experts)
    assert not torch.allclose(restored(base, experts, Place(linear=True), matrices="linear"), experts)


def test_params_are_checked() -> None:
    with pytest.raises(ValueError, match=r"share is a share in \(0, 1\], got 20"):
        TsvCompressParams(share=20)
    with pytest.raises(ValueError, match="matrices is one of all, linear, conv"):
        TsvCompressParams(matrices="blocks")
