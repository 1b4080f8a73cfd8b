"""Averages and spherical methods against mergekit and FusionBench: the same, or with a NumPy computation between."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from harness.merge import merge_state_dicts
from tests.methods.goldens import CASES, assert_golden, assert_near, models_of
from tests.methods.in_numpy import Arrays, arrays

SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_interpolation_0": ("linear_interpolation", {"t": 0.3}),
    "expo_0": ("expo", {"scale": 1.3}),
    "expo_1": ("expo", {"scale": 1.5}),
    "mk_nuslerp_flat_base": ("nuslerp", {"weights": [0.3, 0.5]}),
    "mk_nuslerp_flat_nobase": ("nuslerp", {"weights": [0.6, 0.2]}),
    "mk_nuslerp_last_dim": ("nuslerp", {"weights": [0.5, 0.5], "along": "last"}),
    "mk_nuslerp_row_wise": ("nuslerp", {"weights": [0.4, 0.6], "along": "first"}),
    "mk_multislerp_base": ("multislerp", {"weights": [0.4, 0.3, 0.2, 0.3]}),
    "mk_multislerp_nobase": ("multislerp", {"weights": [0.4, 0.3, 0.2, 0.3]}),
    "mk_karcher": ("karcher", {}),
    "mk_karcher_iter2": ("karcher", {"steps": 2, "tolerance": 1e-7}),
    "mk_nearswap": ("nearswap", {"t": 0.01}),
    "mk_arcee_fusion": ("arcee_fusion", {}),
    "mk_cli_nuslerp": ("nuslerp", {"weights": [0.7, 0.4]}),
    "mk_cli_karcher": ("karcher", {}),
}


@pytest.mark.parametrize("name", SAME)
def test_same_as_the_peer(name: str) -> None:
    method, params = SAME[name]
    base, experts = models_of(name)
    assert_golden(name, merge_state_dicts(base, experts, method, params))


def stock(base: Arrays, experts: list[Arrays], of: str, clamped: bool, rows: str = "") -> Arrays:
    """Model Stock in float64: the mean of cosines or of angles, for a tensor or its rows, `t` clamped or not."""

    def axes(tensor: np.ndarray) -> tuple[int, ...]:
        if not rows or tensor.ndim < 2:
            return tuple(range(tensor.ndim))
        return (-1,) if rows == "last" else tuple(range(1, tensor.ndim))

    eps = 1e-8 if of == "angles" else 0.0
    merged = {}
    for name, start in base.items():
        deltas = [expert[name] - start for expert in experts]
        found = []
        for one, other in itertools.combinations(deltas, 2):
            inner, first, second = (
                (a * b).sum(axes(start), keepdims=True) for a, b in ((one, other), (one, one), (other, other))
            )
            norm = np.sqrt(first * second) + eps
            found.append(np.clip(inner / np.where(norm > 0, norm, 1), -1, 1))
        cosine = np.cos(np.mean(np.arccos(found), 0)) if of == "angles" else np.mean(found, 0)
        if clamped:
            cosine = np.maximum(cosine, 0)
        n = len(experts)
        merged[name] = start + n * cosine / (1 + (n - 1) * cosine) * np.mean(deltas, 0)
    return merged


STOCK = [name for name, case in CASES.items() if case["method"] == "model_stock"]


@pytest.mark.parametrize("name", STOCK)
def test_model_stock_stays_between_the_base_and_the_mean(name: str) -> None:
    """One computation: as the peers average and clamp it is their golden; as the paper bounds t it is ours."""
    given = CASES[name]["hyperparameters"]
    base, experts = models_of(name)
    assert base is not None
    weights = {key: tensor for key, tensor in base.items() if tensor.is_floating_point()}
    numbers = arrays(weights), [{key: arrays(expert)[key] for key in weights} for expert in experts.values()]
    by_row = bool(given.get("filter_wise"))
    theirs = stock(*numbers, "cosines" if name.startswith("mk_") else "angles", False, "last" if by_row else "")
    for key in given.get("ignore_keys") or ():
        theirs[key] = np.mean([expert[key] for expert in numbers[1]], 0)
    atol = CASES[name]["precision"]["suggested_atol"]
    assert_golden(name, {**base, **theirs})

    if name.startswith("mk_") and not by_row:
        assert_golden(name, merge_state_dicts(base, experts, "model_stock", {"clamp": False}))
    ours = merge_state_dicts(base, experts, "model_stock", {"filter_wise": by_row})
    assert_near(ours, stock(*numbers, "cosines", True, "filters" if by_row else ""), atol)
    assert any(
        not math.isclose(float(np.abs(theirs[key] - ours[key].numpy()).max()), 0, abs_tol=1e-5) for key in theirs
    )
