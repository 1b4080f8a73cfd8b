"""Selection where it is hard: ties, samples that mislead, tiny numbers, and histograms of few bins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods import selection
from methods.selection import count_kept, kth_largest

N = 60_000
DENSITIES = [1e-9, 0.0005, 0.2, 0.5, 0.8, 0.9999, 1.0]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def late() -> torch.Tensor:
    """All that is large stands where the sample does not look: behind the first 4096 of each piece of 20,000."""
    values = 1e-6 * randn(N)
    for start in range(0, N, 20_000):
        values[start + 5000 : start + 20_000] = 1 + randn(15_000, seed=start).abs()
    return values


def late_ties(value: float) -> torch.Tensor:
    """The sample sees one number only, and that is not it."""
    values = randn(N).abs() + 1
    for start in range(0, N, 20_000):
        values[start : start + 4096] = value
    return values


def early() -> torch.Tensor:
    """All that is large stands where the sample looks."""
    values = 1e-6 * randn(N)
    for start in range(0, N, 20_000):
        values[start : start + 4096] = 1 + randn(4096, seed=start).abs()
    return values


VALUES = {
    "normal": randn(N),
    "differences of bfloat16": (1 + 0.001 * randn(N)).bfloat16().float() - (1 + 0.001 * randn(N, seed=1)).bfloat16(),
    "all equal": torch.full((N,), -0.3),
    "all zero": torch.zeros(N),
    "two values": torch.where(randn(N) > 0.5, 1.0, -2.0),
    "mostly zeros": torch.where(randn(N) > 1.5, randn(N), torch.zeros(())),
    "one that is not zero": torch.zeros(N).index_fill_(0, torch.tensor([N - 1]), -7.0),
    "subnormals": randn(N) * 1e-41,
    "from tiny to huge": torch.logspace(-44, 38, N)[torch.randperm(N, generator=torch.Generator().manual_seed(0))],
    "infinite among them": torch.cat([torch.tensor([torch.inf, -torch.inf]), randn(N - 2)]),
    "large ones late": late(),
    "large ones early": early(),
    "zeros where it looks": late_ties(0.0),
    "a large one where it looks": late_ties(9.0),
    "one among others where it looks": late_ties(1.5),
    "rising": torch.linspace(0, 1, N),
    "falling": torch.linspace(1, 0, N),
    "neighbours": torch.arange(N, dtype=torch.int32).add_(0x3F800000).view(torch.float32),
    "the largest float": torch.full((N,), torch.finfo(torch.float32).max),
}


def walked(values: torch.Tensor, piece: int = 20_000):
    """A walk over (T, n) values; counts how often it is started."""

    def walk(function, limit=None):
        walk.times += 1
        return [function(values[:, start : start + piece][:, :limit]) for start in range(0, values.shape[1], piece)]

    walk.times = 0
    return walk


def expected(values: torch.Tensor, density: float) -> float:
    ordered = values.abs().sort(descending=True).values
    return float(ordered[count_kept(density, len(values)) - 1])


@pytest.fixture(params=["as it is", "few bins"])
def sizes(request, monkeypatch):
    if request.param == "few bins":
        for name, size in {"_SAMPLED": 512, "_SAMPLES": 700, "_BINS": 16, "_BATCH": 100, "_QUEUE": 1}.items():
            monkeypatch.setattr(selection, name, size)


@pytest.mark.parametrize("name", VALUES)
def test_it_is_the_sorted_one(name, sizes):
    values = VALUES[name]
    for density in DENSITIES:
        assert kth_largest(walked(values[None]), density).tolist() == [expected(values, density)]


def test_each_expert_has_its_own_bracket_and_density(sizes):
    values = torch.stack([*VALUES.values()])
    densities = [DENSITIES[i % len(DENSITIES)] for i in range(len(values))]
    found = kth_largest(walked(values, piece=7777), densities).tolist()
    assert found == [expected(*each) for each in zip(values, densities, strict=True)]


def test_pieces_of_odd_sizes(sizes):
    values = randn(2, 30_011)
    for piece in (1500, 4096, 4097, 30_010, 40_000):
        assert kth_largest(walked(values, piece), 0.3).tolist() == [expected(row, 0.3) for row in values]


def test_two_walks_are_enough_where_the_sample_tells_the_truth():
    for name in ("normal", "differences of bfloat16", "all equal", "subnormals", "two values"):
        walk = walked(VALUES[name][None], piece=8192)
        kth_largest(walk, 0.2)
        assert walk.times == 2, name


def test_the_sample_is_of_early_and_late_pieces_alike(monkeypatch):
    """Layers differ in how far they move; a sample that prefers the late ones would miss, and cost a walk."""
    monkeypatch.setattr(selection, "_SAMPLED", 64)
    monkeypatch.setattr(selection, "_SAMPLES", 2000)
    values = randn(400 * 64) * torch.arange(400).repeat_interleave(64)
    walk = walked(values[None], piece=64)
    samples = np.concatenate(selection._sampled(walk)[0])
    assert 1900 <= len(samples) <= 2 * 2000 + 64
    shares = [np.mean(samples.view(np.float32) <= float(values.abs().quantile(q))) for q in (0.1, 0.5, 0.9)]
    assert shares == pytest.approx([0.1, 0.5, 0.9], abs=0.03)
    assert kth_largest(walk, 0.2).tolist() == [expected(values, 0.2)]
    assert walk.times == 3  # one above, and two


def test_nan_ends_the_search_all_the_same():
    """The engine names NaN when it merges; until then the search must end."""
    values = randn(1, 1000)
    values[0, :900] = float("nan")
    for density in (0.1, 0.5, 1.0):
        assert kth_largest(walked(values), density).shape == (1,)
    every = torch.full((1, 10), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert kth_largest(walked(every), 0.5).isnan().all()
