"""What FusionBench and mergekit compute of task vectors on the same inputs (../shared/goldens)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import harness.pieces
from harness.inputs import Inputs
from harness.merge import Merge, merge, merge_state_dicts
from methods.catalogue import find
from methods.magnitude_prune import MagnitudePruneParams
from pools.faults import specs_of
from pools.roles import NamedRoles
from tests.methods.goldens import BOOK, CASES, State, assert_golden, assert_near, models_of
from tests.methods.in_numpy import Arrays, arrays

WEIGHTS = [0.4, 0.3, 0.2, 0.3]
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "magmax_s0.5": ("magmax", {"scale": 0.5}),
    "magmax_s1.0": ("magmax", {"scale": 1.0}),
    "magmax_extras": ("magmax", {"scale": 0.5}),
    "consensus_ta_0": ("consensus_ta", {"selectivity": 0.4, "agree": 2, "scale": 0.3}),
    "consensus_ta_1": ("consensus_ta", {"selectivity": 0.6, "agree": 1, "scale": 0.5}),
    "mk_ties_rescale": ("ties", {"density": 0.3, "weights": WEIGHTS, "scope": "tensor", "rescale": "l1"}),
    "mk_breadcrumbs": ("breadcrumbs", {"density": 0.6, "gamma": 0.05, "weights": WEIGHTS, "scale": 1.0}),
    "mk_breadcrumbs_overlap": ("breadcrumbs", {"density": 0.92, "gamma": 0.2, "weights": WEIGHTS, "scale": 1.0}),
    "mk_breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.03, "weights": WEIGHTS, "scale": 1.1}),
    "mk_sce_1.0": ("sce", {"density": 1.0}),
    "mk_sce_0.1": ("sce", {"density": 0.1}),
    "mk_cli_sce": ("sce", {"density": 0.2}),
    "mk_ram": ("ram", {"epsilon": 0.01}),
    "mk_ramplus_tl": ("ramplus_tl", {"r": 0.3, "alpha": 0.5, "epsilon": 0.02}),
}


@pytest.mark.parametrize("name", SAME)
def test_same_as_the_peer(name: str) -> None:
    method, params = SAME[name]
    assert_golden(name, merge_state_dicts(*models_of(name), method, params))


# -- mergekit's random masks -----------------------------------------------------------------------------------------

DROPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "mk_dare_linear": ("dare", {"density": 0.4, "scale": 1.0, "scope": "tensor"}),
    "mk_dare_ties": ("dare_ties", {"density": 0.5, "scope": "tensor", "trim": 1.0, "disjoint": "sum"}),
    "mk_della": ("della", {"density": 0.5, "epsilon": 0.2}),
    "mk_della_linear": ("della_linear", {"density": 0.6, "epsilon": 0.15, "scale": 1.0}),
}


def probabilities(delta: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """mergekit's: by the rank of the magnitude along the second axis, or of all of one axis."""
    rows = delta[None] if delta.ndim < 2 else delta
    ranks = np.abs(rows).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") / max(rows.shape[1] - 1, 1)
    return (density - epsilon + 2 * epsilon * ranks).reshape(delta.shape)


def masks_of(name: str, base: State, experts: dict[str, State]) -> dict[tuple[str, str], torch.Tensor]:
    """1 where mergekit keeps an entry: (tensor, expert) -> (*shape)."""
    given = CASES[name]["hyperparameters"]
    generator = torch.Generator().manual_seed(given["torch_seed"])
    found = {}
    for key in sorted(base):
        for expert, tensors in experts.items():
            delta = (tensors[key] - base[key]).numpy()
            chances = probabilities(delta, given["density"], given.get("epsilon", 0.0))
            found[key, expert] = torch.bernoulli(torch.from_numpy(chances).float(), generator=generator)
    return found


@pytest.mark.parametrize("name", DROPPED)
def test_drops_with_the_masks_and_the_norms_of_mergekit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = models_of(name)
    assert base is not None
    keep = masks_of(name, base, experts)

    def drawer(seed, tensor, names, shape, offset, device):
        return lambda index: (
            1 - keep[tensor, names[index]].reshape(-1)[offset : offset + math.prod(shape)].reshape(shape)
        )

    monkeypatch.setattr(harness.pieces, "drawer", drawer)
    method, params = DROPPED[name]
    given = {"weights": WEIGHTS, "rescale": "l1", **params}
    assert_golden(name, merge_state_dicts(base, experts, method, given))


# -- magnitude pruning: FusionBench keeps one entry more of some rows, and divides by the share pruned -----------------


def pruned_in_numpy(base: Arrays, expert: Arrays, names: list[str], ratio: float, minor: bool, by: float) -> Arrays:
    """FusionBench's: of each row the smallest (or largest) entries go, names that are not listed are the base's."""
    merged = dict(base)
    for name in names:
        delta = expert[name] - base[name]
        order = np.argsort(np.abs(delta) if minor else -np.abs(delta), axis=1, kind="stable")
        np.put_along_axis(delta, order[:, : int(delta.shape[1] * ratio)], 0, axis=1)
        merged[name] = base[name] + by * delta
    return merged


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("magnitude_diff_pruning")])
def test_magnitude_prune_of_the_weights_that_fusion_bench_prunes(name: str) -> None:
    given = CASES[name]["hyperparameters"]
    base, experts = models_of(name)
    assert base is not None
    (expert,) = experts.values()
    names = [f"{module}.weight" for module in BOOK["linear_module_order"]]
    if given["extract_names"]:
        names = [key for key in names if ".mlp." in key]
    ratio, minor = given["prune_ratio"], given["prune_type"] == "minor"
    numbers = arrays(base), arrays(expert), names, ratio, minor
    theirs = 1 / ratio if given["rescale"] is True else given["rescale"] or 1.0
    assert_golden(name, pruned_in_numpy(*numbers, theirs))

    def params_of(key: str) -> MagnitudePruneParams:
        n = base[key].shape[-1] if base[key].dim() else 1
        density = (n - int(n * ratio)) / n
        scale = (theirs if given["rescale"] is not True else 1.0) if key in names else 0.0
        rescale = "share" if given["rescale"] is True else "none"
        return MagnitudePruneParams(density, scale, prune=given["prune_type"], rescale=rescale)

    inputs = Inputs(base, experts, NamedRoles(specs_of(base)))
    ours = merge(Merge(find("magnitude_prune"), MagnitudePruneParams(), inputs, params_of))
    if given["rescale"] is not True:
        assert_golden(name, ours)
        return
    for key in names:
        n = base[key].shape[1]
        expected = pruned_in_numpy(*numbers[:2], [key], ratio, minor, n / (n - int(n * ratio)))
        assert_near({key: ours[key]}, {key: expected[key]}, 2e-6)
