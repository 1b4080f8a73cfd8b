"""Subspace boosting: no singular value of the sum below the one at a share of their sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.kinds import Place
from methods.subspace_boosting import SubspaceBoostingParams, subspace_boosting


@pytest.mark.parametrize(
    ("beta", "expected"), [(0.01, [4.0, 4, 4, 4]), (0.5, [4.0, 3, 3, 3]), (0.8, [4.0, 3, 2, 2]), (1.0, [4.0, 3, 2, 1])]
)
def test_by_hand(beta: float, expected: list[float]) -> None:
    deltas = torch.stack([torch.diag(torch.tensor([4.0, 0, 2, 0])), torch.diag(torch.tensor([0, 3.0, 0, 1]))])
    params = SubspaceBoostingParams(beta=beta, scale=0.5)
    merged = subspace_boosting(torch.zeros(4, 4), deltas, params, place=Place())
    torch.testing.assert_close(merged, 0.5 * torch.diag(torch.tensor(expected)))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (1, 4)])
def test_as_a_full_decomposition_has_it(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    base, experts = torch.randn(shape, generator=generator), torch.randn(3, *shape, generator=generator)
    u, s, vh = np.linalg.svd((experts - base).sum(0).numpy().astype(float), full_matrices=False)
    cut = s[np.argmax(np.cumsum(s) >= 0.3 * s.sum())]
    expected = base.numpy() + 0.2 * (u * np.maximum(s, cut)) @ vh
    merged = subspace_boosting(base, experts, SubspaceBoostingParams(beta=0.3, scale=0.2), place=Place())
    np.testing.assert_allclose(merged.numpy(), expected, atol=2e-6)


def test_vectors_are_added_up() -> None:
    merged = subspace_boosting(torch.zeros(2), torch.ones(3, 2), SubspaceBoostingParams(scale=0.5), place=Place())
    assert merged.tolist() == [1.5, 1.5]


def test_beta_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"beta is a share in \(0, 1\], got 0"):
        SubspaceBoostingParams(beta=0)
