"""What FusionBench computes with its optimised rules and its folds on the same inputs (../shared/goldens).

Where its conventions are ours, our result is theirs. Where we decided otherwise, an independent NumPy computation in
float64 stands between: with their convention it gives their result, with ours it gives ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from harness.merge import merge_state_dicts
from pools.faults import specs_of
from pools.roles import NamedRoles
from tests.methods.goldens import BOOK, CASES, GOLDENS, State, assert_golden, assert_near, models_of
from tests.methods.in_numpy import Arrays, arrays

LINEAR = {f"{module}.weight" for module in BOOK["linear_module_order"]}
ENCODER = {name for name in LINEAR if ".encoder." in name}
CLASS_EMBEDDING = "vision_model.embeddings.class_embedding"


class OnlyLinear(NamedRoles):
    """The roles of the names, but for which weights are called linear."""

    def __init__(self, base: State, linear: set[str]) -> None:
        super().__init__(specs_of(base))
        self.linear = linear

    def is_linear(self, name: str) -> bool:
        return name in self.linear


def moved(start: np.ndarray, lr: float, steps: int, gradient: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Adam in float64, as its paper writes it."""
    x, mean, square = start, np.zeros_like(start), np.zeros_like(start)
    for step in range(1, steps + 1):
        slope = gradient(x)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        x = x - lr * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return x


@pytest.mark.parametrize("name", ["wudi_0", "wudi_1"])
def test_wudi(name: str) -> None:
    given = CASES[name]["hyperparameters"]
    base, experts = models_of(name)
    assert base is not None
    excluded = set(given["exclude_keys"] or ())
    roles = OnlyLinear(base, {key for key, tensor in base.items() if tensor.dim() == 2} - excluded)
    params = {"steps": given["iter_num"], "matrices": "linear"}
    assert_golden(name, merge_state_dicts(base, experts, "wudi", params, roles=roles))


def test_wudi_takes_every_matrix_by_default() -> None:
    base, experts = models_of("wudi_1")
    assert_golden("wudi_1", merge_state_dicts(base, experts, "wudi", {"steps": 300}))


# -- dop: FusionBench halves what is no linear layer with each newcomer ------------------------------------------------


def dop_in_numpy(base: Arrays, experts: list[Arrays], given: dict[str, Any], running: bool) -> Arrays:
    """Each expert counted once in what is no linear layer's weight (`running`), or halved and partly reset."""
    merged = dict(experts[0])
    for count, expert in enumerate(experts[1:], start=2):
        for name, tensor in expert.items():
            if name in LINEAR:
                merged[name] = balanced(base[name], (merged[name], tensor), given)
            elif not running and name == CLASS_EMBEDDING:
                merged[name] = base[name]
            else:
                merged[name] = merged[name] + (tensor - merged[name]) / (count if running else 2)
    return merged


def balanced(base: np.ndarray, pair: tuple[np.ndarray, np.ndarray], given: dict[str, Any]) -> np.ndarray:
    sides = []
    for model in pair:
        u, s, vh = np.linalg.svd(model - base, full_matrices=False)
        rank = int(np.searchsorted(np.cumsum(s) / s.sum(), given["svd_epsilon"]))
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        space = given["svd_proj_space"]
        sides.append((("u" in space) * (u * s**2) @ u.T, ("v" in space) * (vh.T * s**2) @ vh))
    weights = np.array([given["alpha"], 1 - given["alpha"]])

    def gradient(x: np.ndarray) -> np.ndarray:
        nonlocal weights
        slopes = [
            2 * (left @ (x - model) + (x - model) @ right) for (left, right), model in zip(sides, pair, strict=True)
        ]
        if given["mgda"]:
            losses = [((x - model) * slope).sum() / 2 for model, slope in zip(pair, slopes, strict=True)]
            one, two = (slope / loss for slope, loss in zip(slopes, losses, strict=True))
            a, b, c = (one * one).sum(), (one * two).sum(), (two * two).sum()
            first = 0.999 if b >= a else 0.001 if b >= c else (c - b) / (a + c - 2 * b)
            keep = given["ema_beta"] if given.get("ema") else 0
            weights = keep * weights + (1 - keep) * np.array([first, 1 - first])
        return weights[0] * slopes[0] + weights[1] * slopes[1]

    return moved((pair[0] + pair[1]) / 2, given["lr"], given["num_steps"], gradient)


@pytest.mark.parametrize("name", ["dop_0", "dop_1", "dop_2"])
def test_dop_counts_each_expert_once_where_fusion_bench_halves(name: str) -> None:
    given = CASES[name]["hyperparameters"]
    base, experts = models_of(name)
    assert base is not None
    numbers = arrays(base), [arrays(expert) for expert in experts.values()]
    assert_golden(name, dop_in_numpy(*numbers, given, running=False))

    params = {
        "lr": given["lr"],
        "steps": given["num_steps"],
        "mgda": given["mgda"],
        "alpha": given["alpha"],
        "ema": given.get("ema_beta", 0.0),
        "svd_epsilon": given["svd_epsilon"],
        "space": given["svd_proj_space"],
    }
    ours = merge_state_dicts(base, experts, "dop", params)
    assert_near(ours, dop_in_numpy(*numbers, given, running=True), CASES[name]["precision"]["suggested_atol"])
    theirs = load_file(GOLDENS / CASES[name]["output"])
    assert_near(ours, {key: theirs[key] for key in LINEAR}, CASES[name]["precision"]["suggested_atol"])


@pytest.mark.parametrize("name", ["doge_ta_0", "doge_ta_1"])
def test_doge_ta(name: str) -> None:
    """The encoder's linear layers alone, with one entry more than the share."""
    given = CASES[name]["hyperparameters"]
    base, experts = models_of(name)
    assert base is not None
    n_entries = sum(base[key].numel() for key in ENCODER)
    share = given["K"] / 100 if given["K"] > 1 else given["K"]
    params = {
        "eta": given["lamda"],
        "subspace": given["subspace"],
        "density": (int(n_entries * share) + 1) / n_entries,
        "others": "base",
    }
    merged = merge_state_dicts(base, experts, "doge_ta", params, roles=OnlyLinear(base, ENCODER))
    assert_golden(name, merged)
