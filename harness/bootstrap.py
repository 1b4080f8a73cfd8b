"""Confidence intervals of a mean over tasks by resampling the examples of each task (Efron 1979)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Rows = Mapping[str, Sequence[float]]  # task -> each example's score
LEVEL = 0.95


def intervals(rows: Sequence[Rows], n: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Percentile intervals of every task's mean, and of the average and the worst over tasks.

    Args:
        rows: For each seed of a random method the examples' scores; an example's score is its mean over them.
        n: Resamplings.
        seed: Of the resampling.

    Returns:
        Task -> (low, high), and those of `average` and `worst`; nothing where there are no rows.

    >>> intervals([{"a": [1.0, 1.0], "b": [0.0, 0.0]}], 10)["average"]
    (0.5, 0.5)
    """
    if not rows or not rows[0] or n < 1:
        return {}
    generator = np.random.default_rng(seed)
    means = {}
    for task in rows[0]:
        own = np.mean([np.asarray(each[task], dtype=np.float64) for each in rows], axis=0)  # (N,)
        chosen = generator.integers(len(own), size=(n, len(own)))
        means[task] = own[chosen].mean(1)  # (n,)
    stacked = np.stack(list(means.values()))  # (tasks, n)
    means |= {"average": stacked.mean(0), "worst": stacked.min(0)}
    tail = 100 * (1 - LEVEL) / 2
    return {
        name: (float(np.percentile(values, tail)), float(np.percentile(values, 100 - tail)))
        for name, values in means.items()
    }
