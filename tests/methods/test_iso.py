"""Iso-C and Iso-CTS, against plain decompositions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.iso import IsoCParams, IsoCtsParams, iso_c, iso_cts, shares
from methods.kinds import Place


def test_by_hand() -> None:
    """The sum diag(3, 1) becomes diag(2, 2); a vector's changes are averaged."""
    base = torch.zeros(2, 2)
    experts = torch.stack([torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([1.0, 1.0]))])
    torch.testing.assert_close(iso_c(base, experts, IsoCParams(), place=Place()), 2 * torch.eye(2))
    vector = iso_c(torch.ones(2), torch.stack([torch.ones(2), torch.full((2,), 3.0)]), IsoCParams(), place=Place())
    assert vector.tolist() == [2, 2]


def test_only_linear_layers_where_asked() -> None:
    base, experts = torch.zeros(2, 2), torch.diag(torch.tensor([4.0, 2.0]))[None]
    params = IsoCParams(matrices="linear")
    assert torch.equal(iso_c(base, experts, params, place=Place()), experts[0])
    assert torch.allclose(iso_c(base, experts, params, place=Place(linear=True)), 3 * torch.eye(2))


def test_a_direction_without_a_change_stays_without() -> None:
    """Of rank one among two: the mean is over both directions, the empty one gets nothing."""
    experts = torch.diag(torch.tensor([2.0, 0.0]))[None]
    torch.testing.assert_close(
        iso_c(torch.zeros(2, 2), experts, IsoCParams(), place=Place()), torch.diag(torch.tensor([1.0, 0.0]))
    )


def test_kernels_are_matrices_of_their_output_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    base, experts = torch.zeros(4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2, generator=generator)
    merged = iso_c(base, experts, IsoCParams(matrices="conv"), place=Place())
    values = np.linalg.svd(merged.reshape(4, 12).numpy(), compute_uv=False)
    expected = np.linalg.svd(experts.sum(0).reshape(4, 12).numpy(), compute_uv=False).mean()
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_all_directions_from_the_sum_are_iso_c() -> None:
    generator = torch.Generator().manual_seed(1)
    base, experts = torch.randn(6, 5, generator=generator), torch.randn(3, 6, 5, generator=generator)
    common = iso_cts(base, experts, IsoCtsParams(common_space_fraction=1.0), place=Place())
    torch.testing.assert_close(common, iso_c(base, experts, IsoCParams(), place=Place()))


@pytest.mark.parametrize(
    ("rank", "n_experts", "fraction", "expected"),
    [(10, 4, 0.8, (10, 0)), (12, 4, 0.5, (4, 2)), (10, 2, 0.5, (6, 2)), (8, 3, 0.0, (2, 2)), (1, 3, 0.0, (1, 0))],
)
def test_shares_of_the_directions(rank: int, n_experts: int, fraction: float, expected: tuple[int, int]) -> None:
    """Halves go to the even number, and there is never more than there is room for."""
    assert shares(rank, n_experts, fraction) == expected


def test_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"common_space_fraction is a share in \[0, 1\], got 80"):
        IsoCtsParams(common_space_fraction=80)
    with pytest.raises(ValueError, match="scale must be a finite number"):
        IsoCParams(scale=float("nan"))
    with pytest.raises(ValueError, match="matrices is one of all, linear, conv"):
        IsoCtsParams(matrices="none")
