"""TSV-M: leading directions of each expert, made orthogonal to each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.kinds import Place
from methods.tsv_m import TsvMParams, tsv_m


def test_by_hand() -> None:
    """Of two experts each keeps its one leading direction; they are orthogonal already."""
    base = torch.zeros(2, 2)
    experts = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 2.0]))])
    merged = tsv_m(base, experts, TsvMParams(), place=Place())
    torch.testing.assert_close(merged, torch.diag(torch.tensor([3.0, 2.0])))


def test_directions_that_overlap_are_turned_apart() -> None:
    """Against the factors of full decompositions in float64."""
    generator = torch.Generator().manual_seed(0)
    base, experts = torch.randn(7, 9, generator=generator), torch.randn(3, 7, 9, generator=generator)
    parts = [np.linalg.svd((expert - base).numpy().astype(float), full_matrices=False) for expert in experts]
    u = np.concatenate([part[0][:, :2] for part in parts], 1)
    s = np.concatenate([part[1][:2] for part in parts])
    v = np.concatenate([part[2][:2] for part in parts], 0)

    def nearest(matrix: np.ndarray) -> np.ndarray:
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        return left @ right

    expected = base.numpy() + 0.5 * (nearest(u) * s) @ nearest(v)
    merged = tsv_m(base, experts, TsvMParams(scale=0.5), place=Place())
    np.testing.assert_allclose(merged.numpy(), expected, atol=2e-6)


def test_weights_are_of_the_changes() -> None:
    generator = torch.Generator().manual_seed(1)
    base, deltas = torch.randn(6, 6, generator=generator), torch.randn(2, 6, 6, generator=generator)
    weights = torch.tensor([0.5, -2.0])[:, None, None]
    weighted = tsv_m(base, base + deltas, TsvMParams(weights=[0.5, -2.0]), place=Place())
    torch.testing.assert_close(weighted, tsv_m(base, base + deltas * weights, TsvMParams(), place=Place()))
    vector = tsv_m(torch.zeros(2), torch.ones(2, 2), TsvMParams(weights=[0.5, -2.0]), place=Place())
    assert vector.tolist() == [-0.75, -0.75]


def test_an_expert_that_changes_nothing_takes_no_part() -> None:
    base = torch.zeros(4, 4)
    moved = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    merged = tsv_m(base, torch.stack([moved, base]), TsvMParams(), place=Place())
    torch.testing.assert_close(merged, torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0])))


def test_more_experts_than_directions_keep_one_each() -> None:
    experts = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 2.0, 0.0]]])
    merged = tsv_m(torch.zeros(1, 3), experts, TsvMParams(), place=Place())
    assert torch.isfinite(merged).all()
    assert merged.abs().max() > 0


def test_as_many_weights_as_experts_are_needed() -> None:
    with pytest.raises(ValueError, match="weights lists 2 numbers for 3 experts"):
        tsv_m(torch.zeros(2, 2), torch.zeros(3, 2, 2), TsvMParams(weights=[1.0, 1.0]), place=Place())
